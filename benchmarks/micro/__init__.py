"""Microbenchmarks: what barriers, exchanges, gathers and products cost on a GPU, beside what the design assumed.

``python -m benchmarks.micro`` compiles the kernels of this folder with nvcc, checks what they compute and times them. The
kernels stand on the wrappers of csrc/cuda, so the numbers are those that the library's kernels are made of; the emulator in
tests/emulator runs the same kernels without a GPU, for their results.
"""
