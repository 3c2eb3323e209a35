"""The benchmark suite: ``python -m benchmarks`` from the repository root. Its method is described in `benchmarks.runner`."""

import os

# Kineto and the allocator log to stderr each time the profiler is used for the memory column; both read their
# variable when PyTorch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
