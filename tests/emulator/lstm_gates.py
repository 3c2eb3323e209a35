"""The operators of the ``cuda`` backend on the emulated launchers: allocation and flattening as csrc/torch does them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .batch_norm_act import EmulatedBatchNormAct
from .bias_act import EmulatedBiasAct
from .lstm_recurrence import EmulatedRecurrence


class EmulatedCuda:
    """Operators ``lstm_gates``, ``_bwd`` and ``_bwd_bwd`` with the signatures of ``torch.ops.fuseblock_cuda``, and
    those of the families ``batch_norm_act`` and ``bias_act``.

    Outputs that the operators allocate start as NaN, so that an element that a kernel forgets is noticed.

    Attributes:
        step_fwd, step_bwd, step_bwd_bwd: the in-place steps of the per-step driver (`per_step.StepKernels`).
        set_seed: (int) order in which the threads of a block take turns, 0: ascending.
        set_workers: (int) how many blocks run at the same time.
        last_launch: [blocks over rows, blocks over units, threads over units, threads over rows].
        norm, bias_act_kernels: the kernels of batch_norm_act and bias_act, which have emulators of their own.
        launch_nothing: (rows, hidden, dtype number, c_dtype number) the error of a launch without operands.
    """

    upfirdn2d: Callable[..., Tensor]  # set by load()
    tiers: dict[str, EmulatedRecurrence]  # so is this, by the names of `resident_recurrence.TIERS`

    def __init__(self, module: ModuleType, norm: EmulatedBatchNormAct, bias_act: EmulatedBiasAct) -> None:
        self._module, self.norm, self.bias_act_kernels = module, norm, bias_act
        for op, run in (norm.operators() | bias_act.operators()).items():
            setattr(self, op, run)
        self.step_fwd, self.step_bwd, self.step_bwd_bwd = (
            module.step_fwd,
            module.step_bwd,
            module.step_bwd_bwd,
        )
        self.set_seed, self.set_workers = module.set_seed, module.set_workers
        self.last_launch, self.launch_nothing = module.last_launch, module.launch_nothing

    def lstm_gates(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c_new = _poisoned(c.shape, gates), _poisoned(c.shape, c)
        self.step_fwd(*(_rows(x) for x in (gates, c, h, c_new)), None, None, 0, None)
        return h, c_new

    def lstm_gates_bwd(
        self, dh: Tensor | None, dc_new: Tensor | None, gates: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        dgates, dc = _poisoned(gates.shape, gates), _poisoned(c.shape, c)
        self._module.gates_bwd(*(_rows(x) for x in (dh, dc_new, gates, c, dgates, dc)))
        return dgates, dc

    def lstm_gates_bwd_bwd(
        self,
        v_dgates: Tensor | None,
        v_dc: Tensor | None,
        dh: Tensor | None,
        dc_new: Tensor | None,
        gates: Tensor,
        c: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = (
            _poisoned(c.shape, gates),
            _poisoned(c.shape, c),
            _poisoned(gates.shape, gates),
            _poisoned(c.shape, c),
        )
        self._module.gates_bwd_bwd(*(_rows(x) for x in (v_dgates, v_dc, dh, dc_new, gates, c, *outputs)))
        return outputs


def _poisoned(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype)


def _rows(x: Tensor | None) -> Tensor | None:
    """x as a matrix: a view of a fresh output, and a view of an input where its strides allow."""
    if x is None or (x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1)):
        return x
    columns = x.shape[-1]
    return x.reshape(x.numel() // columns if columns else 0, columns).contiguous()
