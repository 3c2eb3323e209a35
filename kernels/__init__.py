"""Triton kernels, one module per operator; they import only Triton and each other.

This file imports nothing, so that `fuseblock.kernels` can be named on machines without Triton.
"""
