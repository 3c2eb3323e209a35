"""A batch norm on the CPU as one autograd node that calls the kernels, for plain eager calls (`_library.plain_eager`).

The operators cost tens of microseconds of Python and autograd per pass, more than small tensors take. A backward that is
itself recorded (``create_graph=True``) runs on the operators, whose derivatives compose. Running statistics are updated
by the kernel that computes the batch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ext, dispatch
from ._activations import number
from ._library import KERNEL_DTYPES, backward_is_seen, plain_eager, state_dtype, wants_gradient
from .launch.batch_norm_act import dense, dense_like, is_masked, needs_residual
from .ops import batch_norm_act_bwd

#: The kernels' dtypes and those of their statistics.
_STATE_OF = {dtype: state_dtype(dtype) for dtype in KERNEL_DTYPES}
_PRESENT = _ext.has("fuseblock_cpu", "batch_norm_act")
_FORWARD = torch.ops.fuseblock_cpu.batch_norm_act.default if _PRESENT else None
_BACKWARD = torch.ops.fuseblock_cpu.batch_norm_act_bwd.default if _PRESENT else None

#: Elements up to which inference is two calls of PyTorch's: the tensor stays in cache, and they take less time than ours.
FEW_ELEMENTS = 1 << 18
#: Activations that overwrite their argument.
IN_PLACE: dict[str, Callable[[Tensor, float], object]] = {
    "identity": lambda y, slope: y,
    "relu": lambda y, slope: y.relu_(),
    "leaky_relu": F.leaky_relu_,
    "silu": lambda y, slope: F.silu(y, inplace=True),
    "tanh": lambda y, slope: y.tanh_(),
    "elu": lambda y, slope: F.elu_(y),
}


def can_run(
    x: Tensor, others: tuple[Tensor | None, ...], running: tuple[Tensor | None, Tensor | None]
) -> bool:
    """Whether `run` may take a call without a process group: plain eager, on the CPU, with the kernels' dtypes."""
    if not _PRESENT or not isinstance(x, Tensor) or not x.is_cpu:
        return False
    state = _STATE_OF.get(x.dtype)
    if state is None or dispatch.forced() not in ("auto", "aten", "cpu"):
        return False
    for t in running:
        if t is not None and (t.dtype is not state or not t.is_contiguous()):
            return False
    return plain_eager((x, *others, *running))


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    given: tuple[Tensor | None, Tensor | None],
    moved: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    training: bool,
    per_sample: bool = False,
) -> Tensor:
    """The result y; arguments as in `functional.batch_norm_act` and, ``per_sample``, in the operator.

    ``given``: mean and var of a call that is not training. ``moved``: running statistics that are to be moved.
    """
    x = dense(x)
    residual = dense_like(residual, x)
    if moved[0] is not None and moved[1] is not None:
        torch.autograd.graph.increment_version((moved[0], moved[1]))
    constants = (*given, *moved, momentum, eps, number(activation), negative_slope, training)
    if wants_gradient((x, weight, bias, residual, slope)):
        inputs = x, weight, bias, residual, slope
        result = _BatchNormAct.apply(*inputs, activation, constants, per_sample)  # type: ignore[no-untyped-call]
    elif (
        not training
        and residual is None
        and activation in IN_PLACE
        and x.numel() <= FEW_ELEMENTS
        and dispatch.forced() != "cpu"
        and all(t is None or t.dtype is x.dtype for t in (weight, bias, *given))
    ):
        mean, var = given
        result = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        IN_PLACE[activation](result, negative_slope)
    else:
        assert _FORWARD is not None
        result = _FORWARD(x, weight, bias, residual, slope, *constants, False, per_sample)[0]
    return cast(Tensor, result)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        activation: str,
        constants: tuple[Any, ...],
        per_sample: bool,
    ) -> Tensor:
        assert _FORWARD is not None
        masked = residual is not None and is_masked(activation)
        inputs = x, weight, bias, residual, slope
        y, mean, _, invstd, _, mask = _FORWARD(*inputs, *constants, masked, per_sample)
        ctx.set_materialize_grads(False)
        kept = residual if needs_residual(activation) else None
        ctx.save_for_backward(x, weight, bias, kept, slope, mask if masked else None)
        # Neither inputs nor outputs, and small: they need not be saved as those are.
        ctx.statistics = mean, invstd
        ctx.options = activation, *constants[5:], per_sample
        ctx.forced = dispatch.forced()
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:  # type: ignore[override]
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, slope, mask = ctx.saved_tensors
        mean, invstd = ctx.statistics
        activation, eps, act, negative_slope, training, per_sample = ctx.options
        want_x, want_weight, want_bias, want_residual, want_slope = ctx.needs_input_grad[:5]
        # The gradient of a residual before no activation is dy itself.
        is_identity = activation == "identity"
        wants = want_x, want_weight or want_bias or want_slope, want_residual and not is_identity
        if backward_is_seen():
            count = mean.new_full((), x.numel() // mean.numel())
            saved = x, weight, bias, residual, slope, mean, invstd, count, mask
            options = activation, negative_slope, training, "", eps
            with dispatch.backend(ctx.forced):
                grads = batch_norm_act_bwd(dy, *saved, *options, *wants, per_sample)
        else:
            assert _BACKWARD is not None
            site = mean, invstd, weight, bias, residual, mask, slope, act, negative_slope
            grads = _BACKWARD(dense_like(dy, x), x, *site, training, *wants, per_sample)
        dx, dweight, dbias, dslope, dresidual = grads
        if is_identity:
            dresidual = dy
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            dslope if want_slope else None,
            None,
            None,
            None,
        )
