"""Host side of the Triton kernels in kernels/spectral_norm.py: all layers of a model in each launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels import spectral_norm as kernels

from .._library import state_dtype
from ..dispatch import Candidate
from . import _triton

#: Layers of a launch, whose pointers and sizes are arguments, of which a launch takes 4 KiB.
MAX_LAYERS = 64
WARPS = 4
#: On a GPU: rows and columns of a tile of the kernels over rows, columns and rows of the one over columns.
GPU_BLOCKS = {"BLOCK_R": 8, "BLOCK_K": 512, "BLOCK_C": 64, "BLOCK_L": 64}


def _storage(w: Tensor, dim: int) -> tuple[int, int] | None:
    """(columns of a segment, taps) of a weight as a matrix, see kernels/spectral_norm.py; None if it is stored otherwise."""
    columns = w.numel() // w.shape[dim]
    if w.is_contiguous():
        return w.shape[dim + 1 :].numel(), 1
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if w.dim() in formats and w.is_contiguous(memory_format=formats[w.dim()]) and dim < 2:
        return (columns, w.shape[2:].numel()) if dim == 0 else (1, 1)
    return None


def why_not(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int], *args: Any
) -> str | None:
    """The reason why `spectral_norm` cannot run, or None."""
    if any(x.dtype != weights[0].dtype for x in (*us, *vs)):
        return "it takes weights, us and vs of one dtype"
    if not all(x.is_contiguous() for x in (*us, *vs)):
        return "it takes contiguous us and vs"
    return _why_not_weights(weights, dims)


def why_not_bwd(dys: Any, weights: Sequence[Tensor], state: Tensor, dims: Sequence[int]) -> str | None:
    """The reason why `spectral_norm_bwd` cannot run, or None."""
    return _why_not_weights(weights, dims)


def _why_not_weights(weights: Sequence[Tensor], dims: Sequence[int]) -> str | None:
    if reason := _triton.why_not_chosen(weights[0]):
        return reason
    if any(w.dtype != weights[0].dtype for w in weights):
        return "it takes weights of one dtype"
    for w, dim in zip(weights, dims, strict=True):
        if not 0 < w.numel() < 2**31 - 2**24:
            return "a weight has no elements or 2^31"
        if _storage(w, dim) is None:
            return (
                f"it takes contiguous or channels-last weights, got strides {w.stride()} of {tuple(w.shape)}"
            )
    return None


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`: spectral_norm or spectral_norm_bwd."""
    reason = why_not if op == "spectral_norm" else why_not_bwd
    return (Candidate("triton", globals()[op], reason, _triton.DEVICES),)


@dataclass(frozen=True)
class _Layers:
    """Sizes of the layers of a launch."""

    weights: Sequence[Tensor]
    dims: Sequence[int]

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(w.shape[dim] for w, dim in zip(self.weights, self.dims, strict=True))

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(w.numel() // rows for w, rows in zip(self.weights, self.rows, strict=True))

    def blocks(self) -> dict[str, int]:
        if not _triton.INTERPRETED:
            return GPU_BLOCKS
        # The interpreter's time is that of the number of programs.
        rows, columns = (max(8, triton.next_power_of_2(max(n))) for n in (self.rows, self.columns))
        return {"BLOCK_R": rows, "BLOCK_K": columns, "BLOCK_C": columns, "BLOCK_L": rows}

    def sizes(self) -> dict[str, tuple[int, ...] | None]:
        """The arguments that describe matrices, those left out that say nothing."""
        storage = [s for w, dim in zip(self.weights, self.dims, strict=True) if (s := _storage(w, dim))]
        lengths, taps = tuple(length for length, _ in storage), tuple(n for _, n in storage)
        return {
            "rows": self.rows,
            "columns": self.columns,
            "lengths": None if lengths == self.columns else lengths,
            "taps": None if max(taps) == 1 else taps,
        }

    def programs(self, sizes: Sequence[int], block: int) -> int:
        return sum(triton.cdiv(n, block) for n in sizes)


def _groups(count: int) -> Iterator[slice]:
    return (slice(first, first + MAX_LAYERS) for first in range(0, count, MAX_LAYERS))


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
) -> tuple[list[Tensor], Tensor]:
    """Op `spectral_norm`: ys, and u, v, sigma of every weight (float32 for 16-bit weights); us and vs are updated.

    Two launches an iteration and one to divide; without iterations two.
    """
    ys = [torch.empty_like(w) for w in weights]
    layers = _Layers(weights, dims)
    ends = [sum(n) + 1 for n in zip(layers.rows, layers.columns, strict=True)]
    state = weights[0].new_empty(sum(ends), dtype=state_dtype(weights[0].dtype))
    first = 0
    for group in _groups(len(weights)):
        count = sum(ends[group])
        vectors = tuple(us[group]), tuple(vs[group])
        part = _Layers(weights[group], dims[group])
        _forward(part, *vectors, tuple(ys[group]), state[first : first + count], n_power_iterations, eps)
        first += count
    return ys, state


def _forward(
    layers: _Layers,
    us: tuple[Tensor, ...],
    vs: tuple[Tensor, ...],
    ys: tuple[Tensor, ...],
    state: Tensor,
    n_power_iterations: int,
    eps: float,
) -> None:
    ws, blocks = tuple(layers.weights), layers.blocks()
    row_programs = layers.programs(layers.rows, blocks["BLOCK_R"])
    column_programs = layers.programs(layers.columns, blocks["BLOCK_C"])
    vectors = sum(layers.rows) + sum(layers.columns)
    scratch = state.new_empty(vectors + row_programs + column_programs)
    work, row_sums, column_sums = scratch.split((vectors, row_programs, column_programs))
    options: dict[str, Any] = {**blocks, "EPS": eps, "DTYPE": _triton.math_dtype(state), "num_warps": WARPS}
    iterate, sizes = n_power_iterations > 0, layers.sizes()
    with torch.cuda.device_of(state):
        for n in range(max(n_power_iterations, 1)):
            kernels.spectral_norm_rows_kernel[(row_programs,)](
                ws, us, vs, work, row_sums, column_sums, **sizes, FIRST=n == 0, ITERATE=iterate, **options
            )
            if iterate:
                kernels.spectral_norm_columns_kernel[(column_programs,)](
                    ws, work, row_sums, column_sums, **sizes, **options
                )
        kernels.spectral_norm_scale_kernel[(row_programs,)](
            ws, us, vs, ys, work, state, row_sums, column_sums, **sizes, ITERATE=iterate, **options
        )


def spectral_norm_bwd(
    dys: Sequence[Tensor | None], weights: Sequence[Tensor], state: Tensor, dims: Sequence[int]
) -> list[Tensor | None]:
    """Op `spectral_norm_bwd`: the gradients of the weights that there is a dy of, in two launches."""
    layers = _Layers(weights, dims)
    states = state.to(state_dtype(state.dtype)).split(
        [sum(n) + 1 for n in zip(layers.rows, layers.columns, strict=True)]
    )
    dws: list[Tensor | None] = [
        None if dy is None else torch.empty_like(w) for dy, w in zip(dys, weights, strict=True)
    ]
    wanted = [n for n, dw in enumerate(dws) if dw is not None]
    for group in _groups(len(wanted)):
        chosen = wanted[group]
        part = _Layers([weights[n] for n in chosen], [dims[n] for n in chosen])
        _backward(
            part,
            *(tuple(tensors[n] for n in chosen) for tensors in (dys, dws, states)),  # type: ignore[arg-type]
        )
    return dws


def _backward(
    layers: _Layers, dys: tuple[Tensor, ...], dws: tuple[Tensor, ...], states: tuple[Tensor, ...]
) -> None:
    ws, blocks, sizes = tuple(layers.weights), layers.blocks(), layers.sizes()
    dys = tuple(
        dy if dy.stride() == w.stride() else torch.empty_like(w).copy_(dy)
        for dy, w in zip(dys, ws, strict=True)
    )
    programs = layers.programs(layers.rows, blocks["BLOCK_R"])
    row_sums = states[0].new_empty(programs)
    options: dict[str, Any] = {**blocks, "DTYPE": _triton.math_dtype(ws[0]), "num_warps": WARPS}
    with torch.cuda.device_of(ws[0]):
        kernels.spectral_norm_inner_kernel[(programs,)](dys, ws, row_sums, **sizes, **options)
        kernels.spectral_norm_gradient_kernel[(programs,)](dys, dws, states, row_sums, **sizes, **options)
