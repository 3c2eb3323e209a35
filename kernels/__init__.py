"""Triton kernels, one module per operator. They import only Triton and each other; this file imports nothing, so that
`fuseblock.kernels` can be named on machines without Triton."""
