"""Operator ``upfirdn2d``: upsample, pad, FIR filter and downsample images; differentiable to any order.

    y[n, c, i, j] = gain sum_{k, l} f'[k, l] u[n, c, i down_y + k - pad_y0, j down_x + l - pad_x0]
    u[n, c, i up_y, j up_x] = x[n, c, i, j], zero elsewhere;   f' = f if flip_filter, else f turned by 180 degrees

It is linear in x, and its adjoint is the same operator with up and down exchanged, the filter turned and other padding.
So the gradient of every order is one call, and nothing but the filter is saved. The filter has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import dispatch
from .._library import DifferentiableOp, loop_vmap, state_dtype
from ..reference import upfirdn2d as reference
from . import _candidates

dispatch.register(
    "upfirdn2d",
    _candidates.compiled("cpu", "upfirdn2d"),
    _candidates.compiled("cuda", "upfirdn2d"),
    *_candidates.triton("upfirdn2d", "triton_upfirdn2d"),
    _candidates.reference(reference.upfirdn2d_reference),
)


def output_size(size: int, taps: int, up: int, down: int, pad0: int, pad1: int) -> int:
    """Samples that `size` samples become along one dimension; not positive where the filter does not fit."""
    return (size * up + pad0 + pad1 - taps) // down + 1


def check(
    x: Tensor,
    f: Tensor,
    up_x: int,
    up_y: int,
    down_x: int,
    down_y: int,
    pad_x0: int,
    pad_x1: int,
    pad_y0: int,
    pad_y1: int,
    flip_filter: bool,
    gain: float,
) -> tuple[int, int, int, int]:
    """The shape of the result; raises ValueError or TypeError when the arguments do not fit together."""
    if x.dim() != 4:
        raise ValueError(f"upfirdn2d: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    if f.dim() != 2 or f.shape[0] < 1 or f.shape[1] < 1:
        raise ValueError(f"upfirdn2d: expected a filter of shape (fh, fw), got {tuple(f.shape)}")
    for name, tensor in (("x", x), ("f", f)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"upfirdn2d: expected {name} of a floating point dtype, got {tensor.dtype}")
    if f.device != x.device:
        raise ValueError(f"upfirdn2d: expected x and f on one device, got {x.device} and {f.device}")
    for name, value in (("up", up_x), ("up", up_y), ("down", down_x), ("down", down_y)):
        if value < 1:
            raise ValueError(f"upfirdn2d: expected {name} of at least 1, got {value}")
    n, c, h, w = x.shape
    out_h = output_size(h, f.shape[0], up_y, down_y, pad_y0, pad_y1)
    out_w = output_size(w, f.shape[1], up_x, down_x, pad_x0, pad_x1)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"upfirdn2d: a filter of shape {tuple(f.shape)} is larger than the upsampled and padded image of shape "
            f"{(h * up_y + pad_y0 + pad_y1, w * up_x + pad_x0 + pad_x1)}"
        )
    return n, c, out_h, out_w


def _impl(x: Tensor, f: Tensor, *args: Any) -> Tensor:
    check(x, f, *args)
    result: Tensor = dispatch.run("upfirdn2d", (x, f.to(state_dtype(x.dtype)), *args))
    return result


def _fake(x: Tensor, f: Tensor, *args: Any) -> Tensor:
    y = x.new_empty(check(x, f, *args))
    return y.contiguous(memory_format=reference.memory_format_of(x))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, f, *ctx.args = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(f)
    ctx.forced = dispatch.forced()


def _backward(ctx: Any, dy: Tensor | None) -> Any:
    nothing = (None,) * 11
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("upfirdn2d has no gradient with respect to the filter")
    if dy is None:
        return None, *nothing
    (f,) = ctx.saved_tensors
    up_x, up_y, down_x, down_y, pad_x0, _, pad_y0, _, flip_filter, gain = ctx.args
    (h, w), (out_h, out_w), (taps_y, taps_x) = ctx.size, dy.shape[2:], f.shape
    args = (
        down_x,
        down_y,
        up_x,
        up_y,
        taps_x - 1 - pad_x0,
        w * up_x - out_w * down_x + pad_x0 - up_x + 1,
        taps_y - 1 - pad_y0,
        h * up_y - out_h * down_y + pad_y0 - up_y + 1,
        not flip_filter,
        gain,
    )
    with dispatch.backend(ctx.forced):
        return upfirdn2d(dy, f, *args), *nothing


def _vmap(info: Any, in_dims: Sequence[int | None], x: Tensor, f: Tensor, *args: Any) -> Any:
    """Mapped images join the batch; mapped filters are taken one by one."""
    if in_dims[1] is not None:
        outputs, out_dims = _loop(info, in_dims, x, f, *args)
        return outputs[0], out_dims[0]
    x = x.movedim(in_dims[0] or 0, 0)
    y = upfirdn2d(x.flatten(0, 1), f, *args)
    return y.unflatten(0, (info.batch_size, x.shape[1])), 0


upfirdn2d: DifferentiableOp = DifferentiableOp(
    "upfirdn2d(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, SymInt pad_x0, SymInt pad_x1,"
    " SymInt pad_y0, SymInt pad_y1, bool flip_filter, float gain) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
)
_loop = loop_vmap(lambda *args: (upfirdn2d(*args),))
