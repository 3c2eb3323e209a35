"""Host side of the Triton engines of the op `lstm_recurrence`.

Three engines, in order of preference: *persistent*, one launch with W_hh on chip (kernels/lstm_recurrence.py, small H,
first order); *fused step*, one launch per time step (`triton_lstm_recurrence_step`, any H, first order); *per step*, one
GEMM and one kernel per time step (`per_step`, any H, first and second order). All save the same tensors, so any forward
can meet any backward. A further engine is one more line in `_ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fuseblock.kernels.lstm_recurrence import lstm_recurrence_bwd_kernel, lstm_recurrence_fwd_kernel

from ..dispatch import Candidate
from . import _triton, per_step, triton_lstm_gates
from . import triton_lstm_recurrence_step as fused_step

_BLOCK_B = 16


@dataclass(frozen=True)
class PersistentConfig:
    """How the persistent kernels run one size: no configuration listed here spills registers."""

    block_h: int
    num_warps: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that suffice for both kernels in every dtype, as compiled."""
        return 151552 if self.block_h == 128 else 86016

    @property
    def options(self) -> dict[str, int | None]:
        """Compiler options.

        Small tiles leave registers unused, which ptxas would save for further blocks at the price of a few spills;
        the largest one is better left to ptxas.
        """
        return {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": 255 if self.block_h < 128 else None}


def persistent_config(dtype: torch.dtype, hidden: int) -> PersistentConfig | str:
    """The configuration for H units of `dtype`, or the reason why there is none."""
    if dtype == torch.float64:
        return "the persistent kernel does not run in float64"
    limit = 64 if dtype == torch.float32 else 128
    if hidden > limit:
        return f"W_hh of H = {hidden} does not fit on chip (limit {limit} in {dtype})"
    if hidden > 64 and hidden % 16:
        return f"H = {hidden} above 64 must be a multiple of 16, or registers run out"
    block_h = max(triton.next_power_of_2(hidden), 16)
    return PersistentConfig(block_h, num_warps=8 if block_h >= 64 else 4)


def prefetches(hidden: int, d_gates: Tensor | None = None, d_c: Tensor | None = None) -> bool:
    """Whether the input of the next step is fetched early: where registers are left to hold it.

    Unaligned rows take an address register per element, and further gradients take registers of their own.
    """
    return hidden % 16 == 0 and d_gates is None and d_c is None


def _why_not_persistent(
    x: Tensor, w_hh: Tensor, w_hr: Tensor | None, batch_sizes: Tensor | None
) -> str | None:
    reason = _triton.why_not(x) or per_step.why_not(x, batch_sizes)
    if reason is not None:
        return reason
    if w_hr is not None:
        return "the persistent kernel has no projection"
    config = persistent_config(x.dtype, w_hh.shape[1] // 4)
    return config if isinstance(config, str) else _triton.why_not_shared(x, config.shared)


def why_not_persistent_fwd(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> str | None:
    """The reason why `persistent_fwd` cannot take these arguments, or None."""
    return _why_not_persistent(gx, w_hh, w_hr, batch_sizes)


def why_not_persistent_bwd(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> str | None:
    """The reason why `persistent_bwd` cannot take these arguments, or None."""
    return _why_not_persistent(gates, w_hh, w_hr, batch_sizes)


def why_not_per_step_fwd(gx: Tensor, *args: Any) -> str | None:
    """The reason why `per_step_fwd` cannot take the arguments of lstm_recurrence, or None."""
    return _triton.why_not(gx) or per_step.why_not(gx, args[5])


def why_not_per_step_bwd(*args: Any) -> str | None:
    """The reason why `per_step_bwd` cannot take the arguments of lstm_recurrence_bwd, or None."""
    return _triton.why_not(args[5]) or per_step.why_not(args[5], args[11])


def why_not_per_step_bwd_bwd(*args: Any) -> str | None:
    """The reason why `per_step_bwd_bwd` cannot take the arguments of lstm_recurrence_bwd_bwd, or None."""
    return _triton.why_not(args[9]) or per_step.why_not(args[9], args[15])


def persistent_fwd(
    gx: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence`: (y, h_n, c_n, gates, c), in one launch."""
    n_steps, batch, _ = gx.shape
    directions, four_h, hidden = w_hh.shape
    config = persistent_config(gx.dtype, hidden)
    if isinstance(config, str):
        raise ValueError(config)
    y = gx.new_empty(n_steps, batch, directions * hidden)
    h_n, c_n = h0.new_empty(h0.shape), c0.new_empty(c0.shape)
    gates = gx.new_empty((n_steps, batch, directions * four_h) if save_state else (0,))
    c = c0.new_empty((n_steps, batch, directions * hidden) if save_state else (0,))
    if batch == 0:
        return y, h_n, c_n, gates, c
    gx = _triton.near_rows(gx, hidden, _BLOCK_B)
    with torch.cuda.device_of(gx):
        lstm_recurrence_fwd_kernel[(triton.cdiv(batch, _BLOCK_B), directions)](
            gx,
            _triton.dense(h0, hidden),
            _triton.dense(c0, hidden),
            _triton.dense(w_hh, hidden),
            _triton.dense(lengths, hidden),
            y,
            h_n,
            c_n,
            gates if save_state else None,
            c if save_state else None,
            n_steps,
            batch,
            hidden,
            gx.stride(0),
            gx.stride(1),
            PRECISION=_triton.precision(gx.dtype),
            PREFETCH=prefetches(hidden),
            ALIGNED=hidden % 16 == 0,
            BLOCK_B=_BLOCK_B,
            BLOCK_H=config.block_h,
            **config.options,
        )
    return y, h_n, c_n, gates, c


def persistent_bwd(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_c: Tensor | None,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `lstm_recurrence_bwd`: (dgx, dh0, dc0, dh), in one launch; dh is empty."""
    n_steps, batch, _ = gates.shape
    directions, _, hidden = w_hh.shape
    config = persistent_config(gates.dtype, hidden)
    if isinstance(config, str):
        raise ValueError(config)
    dgx = gates.new_empty(gates.shape)
    dh0, dc0 = gates.new_empty(directions, batch, hidden), c0.new_empty(c0.shape)
    if batch == 0:
        return dgx, dh0, dc0, gates.new_empty(0)
    dy = None if dy is None else _triton.near_rows(dy, hidden, _BLOCK_B)
    with torch.cuda.device_of(gates):
        lstm_recurrence_bwd_kernel[(triton.cdiv(batch, _BLOCK_B), directions)](
            dy,
            *(_triton.dense(x, hidden) for x in (dh_n, dc_n, d_gates, d_c, gates, c, c0, w_hh, lengths)),
            dgx,
            dh0,
            dc0,
            n_steps,
            batch,
            hidden,
            0 if dy is None else dy.stride(0),
            0 if dy is None else dy.stride(1),
            PRECISION=_triton.precision(gates.dtype),
            PREFETCH=prefetches(hidden, d_gates, d_c),
            ALIGNED=hidden % 16 == 0,
            BLOCK_B=_BLOCK_B,
            BLOCK_H=config.block_h,
            **config.options,
        )
    return dgx, dh0, dc0, gates.new_empty(0)


def per_step_fwd(gx: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Op `lstm_recurrence`: (y, h_n, c_n, gates, c), one step kernel per time step."""
    with torch.cuda.device_of(gx):
        return per_step.lstm_recurrence(triton_lstm_gates, gx, *args)


def per_step_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Op `lstm_recurrence_bwd`: (dgx, dh0, dc0, dh), one step kernel per time step."""
    with torch.cuda.device_of(args[5]):
        return per_step.lstm_recurrence_bwd(triton_lstm_gates, *args)


def per_step_bwd_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Op `lstm_recurrence_bwd_bwd`: its nine outputs, two step kernels per time step."""
    with torch.cuda.device_of(args[9]):
        return per_step.lstm_recurrence_bwd_bwd(triton_lstm_gates, *args)


# In order of preference. That the fused step is ahead of the step of two launches is a guess: no GPU has measured it yet,
# and where a table of measurements exists it decides.
_ENGINES: dict[str, tuple[tuple[str, Callable[..., Any], Callable[..., str | None]], ...]] = {
    "lstm_recurrence": (
        ("persistent", persistent_fwd, why_not_persistent_fwd),
        ("fused step", fused_step.fwd, fused_step.why_not_fwd),
        ("per step", per_step_fwd, why_not_per_step_fwd),
    ),
    "lstm_recurrence_bwd": (
        ("persistent", persistent_bwd, why_not_persistent_bwd),
        ("fused step", fused_step.bwd, fused_step.why_not_bwd),
        ("per step", per_step_bwd, why_not_per_step_bwd),
    ),
    "lstm_recurrence_bwd_bwd": (("per step", per_step_bwd_bwd, why_not_per_step_bwd_bwd),),
}


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`, a member of the family lstm_recurrence, in order of preference."""
    return tuple(
        Candidate("triton", run, why_not, devices=_triton.DEVICES, variant=engine)
        for engine, run, why_not in _ENGINES[op]
    )
