"""The performance model: what a kernel moves and computes as formulas in its sizes, and the time that a GPU needs at least.

A formula is a Python expression in the symbols of its family, which serves as text, too. ``FAMILIES`` in
`benchmarks.model_kernels` holds all kernels; tests count what the kernels load and store and compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Values of symbols by name.
Sizes = Mapping[str, float]


@dataclass(frozen=True)
class Rates:
    """What a GPU can do, in bytes and floating-point operations per second.

    Attributes:
        name: of the GPU.
        memory, tensor, vector: by its data sheet: memory, dense bfloat16 tensor cores, float32 units.
        memory_share, compute_share: what part of these a kernel is assumed to reach.
    """

    name: str
    memory: float
    tensor: float
    vector: float
    memory_share: float = 0.9
    compute_share: float = 0.8

    @property
    def achievable_memory(self) -> float:
        """Bytes per second that floors are computed with."""
        return self.memory * self.memory_share

    def achievable(self, on_tensor_cores: bool) -> float:
        """Floating-point operations per second that floors are computed with."""
        return (self.tensor if on_tensor_cores else self.vector) * self.compute_share


#: 4.3 of 4.8 TB/s and 790 of 989 TFLOP/s on an H200, and the same shares elsewhere.
GPUS = (
    Rates("H200", 4.8e12, 989e12, 67e12, memory_share=4.3 / 4.8),
    Rates("H100 SXM", 3.35e12, 989e12, 67e12, memory_share=4.3 / 4.8),
    Rates("A100 SXM 80 GB", 2.039e12, 312e12, 19.5e12, memory_share=4.3 / 4.8),
)


def evaluate(formula: str, sizes: Sizes) -> float:
    """The value of a formula."""
    return float(eval(formula, {"__builtins__": {}, "ceil": math.ceil, "min": min, "max": max}, dict(sizes)))


def shown(formula: str) -> str:
    """A formula as text: products by juxtaposition."""
    return re.sub(r"(?<=[\w)])\*(?=[\w(])", " ", formula)


@dataclass(frozen=True)
class Kernel:
    """What one kernel moves and computes, summed over its launches.

    Attributes:
        name: what the table calls it.
        reads, writes: bytes of tensors each byte of which is read, or written, once.
        again: bytes of what is read more than once: the first time from memory, then from cache.
        flops: floating-point operations, without those that only move values.
        launches: of an eager call.
        tensor: whether tensor cores take the operations.
        cuda, triton: the kernel's function in each backend, a regular expression, or None where there is none.
        sizes: of its own, where the family's example is none of it.
    """

    name: str
    reads: str
    writes: str
    again: str = "0"
    flops: str = "0"
    launches: str = "1"
    tensor: bool = False
    cuda: str | None = None
    triton: str | None = None
    sizes: Sizes = field(default_factory=dict)

    def read(self, sizes: Sizes) -> float:
        """Bytes from memory."""
        return evaluate(self.reads, sizes) + evaluate(self.again, sizes)

    def moved(self, sizes: Sizes) -> float:
        """Bytes from and to memory."""
        return self.read(sizes) + evaluate(self.writes, sizes)

    def floor(self, sizes: Sizes, rates: Rates) -> float:
        """Seconds that moving and computing take at least, whichever takes longer."""
        compute = evaluate(self.flops, sizes) / rates.achievable(self.tensor)
        return max(self.moved(sizes) / rates.achievable_memory, compute)

    def is_memory_bound(self, sizes: Sizes, rates: Rates) -> bool:
        """Whether its floor is that of memory."""
        return self.floor(sizes, rates) <= self.moved(sizes) / rates.achievable_memory


@dataclass(frozen=True)
class Family:
    """Kernels with the same symbols.

    Attributes:
        title: heading.
        symbols: meaning of each symbol.
        example: what the example is; sizes: its values.
        kernels: in the order of a training step.
        note: what a reader must know beside the table.
    """

    title: str
    symbols: Mapping[str, str]
    example: str
    sizes: Sizes
    kernels: tuple[Kernel, ...]
    note: str = ""

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name."""
        return next(kernel for kernel in self.kernels if kernel.name == name)

    def sizes_of(self, kernel: Kernel) -> Sizes:
        """The example's, as they are for one kernel."""
        return {**self.sizes, **kernel.sizes}
