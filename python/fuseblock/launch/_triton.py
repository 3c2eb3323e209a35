"""What the Triton launchers share: availability, alignment, block sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseblock.kernels import lstm_gates as _kernels

from .. import _tables, dispatch
from .gpu import gpu_of

#: Whether kernels were decorated under TRITON_INTERPRET=1, which runs them on the CPU, for tests.
INTERPRETED = not isinstance(_kernels.lstm_gates_fwd_kernel, triton.runtime.JITFunction)

#: Device types whose tensors the launchers take.
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)

_MATH_DTYPE: dict[torch.dtype, Any] = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def math_dtype(x: Tensor) -> Any:
    """The Triton dtype of the mathematics on x."""
    return _MATH_DTYPE[x.dtype]


def why_not_shared(x: Tensor, needed: int) -> str | None:
    """The reason why x's device cannot give `needed` bytes of shared memory to one block, or None."""
    if INTERPRETED or (available := gpu_of(x).shared_bytes) >= needed:
        return None
    return f"{needed} bytes of shared memory per block are needed, {available} are there"


def why_not(x: Tensor) -> str | None:
    """The reason why no Triton kernel can run tensors like x, or None."""
    if x.dtype not in _MATH_DTYPE:
        return f"dtype {x.dtype} is not one of float64, float32, float16, bfloat16"
    if INTERPRETED:
        return None
    if x.device.type != "cuda":
        return f"tensors are on {x.device}"
    capability = gpu_of(x).capability
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def why_not_chosen(x: Tensor) -> str | None:
    """`why_not` for operators that have something better on a CPU than the interpreter: that it is not forced."""
    reason = why_not(x)
    if reason is None and x.device.type != "cuda" and dispatch.forced() != "triton":
        reason = "Triton's interpreter is for tests: backend('triton') forces it"
    return reason


def aligned(hidden: int, tensors: Iterable[Tensor | None]) -> bool:
    """Whether every run of H units along the last dimension of every tensor starts at a multiple of 16 bytes."""
    return hidden % 16 == 0 and all(x is None or _aligned(x) for x in tensors)


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])


def near_rows(x: Tensor, hidden: int, block_rows: int) -> Tensor:
    """X (T, B, columns) such that 32-bit offsets within `block_rows` rows hold and H % 16 == 0 means aligned."""
    if x.stride(-1) == 1 and block_rows * x.stride(1) < 2**31 and (hidden % 16 or aligned(hidden, (x,))):
        return x
    # clone, not contiguous(): a misaligned contiguous view must move too.
    return x.clone(memory_format=torch.contiguous_format)


@overload
def dense(x: Tensor, hidden: int) -> Tensor: ...
@overload
def dense(x: Tensor | None, hidden: int) -> Tensor | None: ...
def dense(x: Tensor | None, hidden: int) -> Tensor | None:
    """X contiguous, and aligned where H allows it."""
    if x is None or (x.is_contiguous() and (hidden % 16 or aligned(hidden, (x,)))):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def precision(dtype: torch.dtype, operation: str = "matmul") -> str:
    """How float32 dots round their operands, for tl.dot, as PyTorch's "matmul" or "conv"; other dtypes ignore it."""
    return "tf32" if dtype == torch.float32 and _tables.tf32(operation) else "ieee"


def gpu_step_blocks(hidden: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_H) of the step kernels on a GPU: tiles of 512 units."""
    block_h = min(max(triton.next_power_of_2(hidden), 16), 128)
    return 512 // block_h, block_h


def step_blocks(rows: int, hidden: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_H) of the step kernels.

    One program covers everything in the interpreter, whose time is that of the number of programs.
    """
    if INTERPRETED:
        return triton.next_power_of_2(rows), triton.next_power_of_2(hidden)
    return gpu_step_blocks(hidden)


def step_warps(is_aligned: bool) -> int:
    """Warps of the step kernels: without wide accesses every element takes an address, so fewer per thread."""
    return 4 if is_aligned else 8
