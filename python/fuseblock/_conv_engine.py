"""The engine of a convolution and of what stands behind or before it in a block.

``aten``: PyTorch's convolution, then a fused norm or an activation. ``triton``: a kernel of ours that does some of that too:

    conv_norm_act   behind it a batch norm in training, and its activation: the convolution's epilogue takes the statistics
    conv_act        behind it an activation: the epilogue applies it
    norm_act_conv   before it a batch norm in training, and its activation: the input gradient's epilogue goes through the
                    activation and adds up the norm's sums

So tables of measurements call them (`_tables`). On a GPU the faster by its table is taken, and where that says nothing
PyTorch's, as everywhere else. A forced backend ``triton`` takes ours wherever it can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _tables, dispatch
from ._convolution import Geometry
from ._library import forward_mode_active, wants_gradient
from .ops._questions import of_convolution
from .ops.conv2d_act import ACTIVATIONS
from .ops.conv_transpose2d_subpixel import GEOMETRY as SUBPIXEL
from .ops.norm_act_conv_bwd import why_not_geometry

_MEASURED: ContextVar[str] = ContextVar("fuseblock_conv_engine", default="")


@contextmanager
def measuring(engine: str) -> Iterator[None]:
    """Take an engine within a ``with`` block wherever it can run, whatever is faster: to measure it."""
    token = _MEASURED.set(engine)
    try:
        yield
    finally:
        _MEASURED.reset(token)


class Call(NamedTuple):
    """A convolution with what stands behind or before it.

    Attributes:
        op: ``conv_norm_act``, ``conv_act`` or ``norm_act_conv``.
        x, weight, bias: the convolution's tensors; of ``norm_act_conv``, x is the norm's, which is like the convolution's.
        geometry: how it runs.
        activation, negative_slope: behind it, of ``conv_act``; before it, of ``norm_act_conv``.
    """

    op: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    activation: str = "identity"
    negative_slope: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, autocast considered."""
        return torch.get_autocast_dtype(self._autocasts) if self.is_cast else self.x.dtype

    @property
    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in that dtype."""
        return self.weight.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)

    @property
    def is_cast(self) -> bool:
        """Whether autocast casts the tensors."""
        return self.x.dtype is not torch.float64 and torch.is_autocast_enabled(self._autocasts)

    @property
    def _autocasts(self) -> str:
        """The device whose autocast counts: tensors without memory have none."""
        return "cuda" if self.x.is_cuda else "cpu"

    @property
    def operator(self) -> str:
        """The operator of ours that would run it."""
        if self.op != "conv_norm_act":
            return {"conv_act": "conv2d_act", "norm_act_conv": "norm_act_conv_bwd"}[self.op]
        return "conv_transpose2d_subpixel" if self.geometry.transposed else "conv2d_stats"


def may_choose(x: Tensor) -> bool:
    """Whether there is a choice for calls on x; where there is none, nobody need look for reasons."""
    return isinstance(x, Tensor) and (x.is_cuda or dispatch.forced() == "triton")


def choose(call: Call) -> tuple[str, str]:
    """(engine, why): ``"aten"`` or ``"triton"``."""
    forced = dispatch.forced()
    if forced not in ("auto", "triton"):
        return "aten", f"backend {forced!r} is forced"
    reason = why_not_triton(call)
    if reason is not None:
        return "aten", f"triton cannot: {reason}"
    if _MEASURED.get():
        return _MEASURED.get(), "it is being measured"
    if forced == "triton":
        return "triton", "backend 'triton' is forced"
    table = _tables.in_force(call.x.get_device())
    answer = table.answer(call.op, key(call) if table.entries else ())
    engine = next((name for name in answer.order if name in ("aten", "triton")), "aten")
    return engine, answer.rule(engine)


def why_not_triton(call: Call) -> str | None:
    """None when our kernels can run the call, else the reason why they cannot."""
    if is_compiling() or torch._C._get_tracing_state() is not None:
        return "compilers and tracers see PyTorch's convolution"
    if torch._C._are_functorch_transforms_active() or forward_mode_active():
        return "transforms see PyTorch's convolution"
    reason = _why_not_geometry(call)
    if reason is None:
        candidate = next(c for c in dispatch.candidates(call.operator) if c.name == "triton")
        reason = candidate.why_not(call.x, call.weight)
    return reason


def _why_not_geometry(call: Call) -> str | None:
    """The reason in what is asked. What PyTorch refuses is left to PyTorch."""
    _, x, weight, bias, geometry, activation, negative_slope = call
    if x.dim() != 4:
        return "the input has no batch"
    if geometry.dilation != (1, 1):
        return "dilation"
    if geometry.transposed and (geometry != SUBPIXEL or tuple(weight.shape[2:]) != (4, 4)):
        return "transposed, it takes kernel 4, stride 2, padding 1 and no groups"
    if call.op == "conv_norm_act" and geometry.groups != 1:
        return "groups before a batch norm"
    if call.op == "norm_act_conv":
        if activation == "prelu":
            return "prelu's slope has a gradient, too"
        if call.dtype is not x.dtype:
            return "autocast casts between norm and convolution"
        if (reason := why_not_geometry(geometry, weight.shape[2:], x.shape[2:])) is not None:
            return reason
    elif activation not in ACTIVATIONS or negative_slope < 0:
        return f"the result of {activation} does not tell its derivative"
    channels = weight.shape[0] if geometry.transposed else weight.shape[1] * geometry.groups
    fits = all(
        size + 2 * pad >= taps
        for size, pad, taps in zip(x.shape[2:], geometry.padding, weight.shape[2:], strict=True)
    )
    if x.shape[1] != channels or x.numel() == 0 or not fits:
        return f"no convolution takes {tuple(x.shape)} with {tuple(weight.shape)}"
    for t in (weight, bias):
        if t is not None and (t.device != x.device or (t.dtype is not x.dtype and not call.is_cast)):
            return "the tensors are of several dtypes or devices"
    channels_last = torch.channels_last
    if x.is_contiguous() and not weight.is_contiguous() and not x.is_contiguous(memory_format=channels_last):
        return "input and weight ask for different memory formats"
    return None


def key(call: Call) -> _tables.Key:
    """What a table is asked."""
    _, x, weight, bias, geometry, *_ = call
    mode = "train" if wants_gradient((x, weight, bias)) else "forward"
    sizes = of_convolution(x, weight, geometry.stride, geometry.groups, geometry.transposed, call.dtype)
    return ("mode", mode), *sizes
