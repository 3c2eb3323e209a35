"""Operator ``norm_act_conv_bwd``: backward through a convolution and the batch norm with activation before it.

    a = act(weight xhat + bias), xhat = (x - mean) invstd;   y = conv(a, conv_weight);   dy: of y
    G = da act'(weight xhat + bias), da the gradient of a;   dbias = sum G, dweight = sum G xhat
    dx = weight invstd (G - mean of G - xhat mean of G xhat)

x (N, C, H, W), contiguous or channels-last, as dx; mean, invstd (C,) are the batch's, weight, bias (C,) the norm's. da is a
convolution, of dy, and the kernel that computes it reads x, writes G in place of da and adds up the sums: the norm's
backward then reads G and x once instead of twice. Of convolutions without dilation: stride 1, padding below the kernel's
size; kernel 4, stride 2, padding 1 without groups, of an even image or transposed.

It has no derivative: what is differentiated again runs on `batch_norm_act_bwd` and PyTorch's convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from .._convolution import Geometry
from .._library import opaque
from ..reference import conv_stats as reference
from . import _candidates, _conv_stats
from .batch_norm_act import empty_like
from .conv_transpose2d_subpixel import GEOMETRY as SUBPIXEL

dispatch.register(
    "norm_act_conv_bwd",
    *_candidates.triton("norm_act_conv_bwd", "triton_conv_stats"),
    _candidates.reference(reference.norm_act_conv_bwd_reference),
)


def why_not_geometry(geometry: Geometry, taps: Sequence[int], image: Sequence[int]) -> str | None:
    """The reason why the input gradient of a convolution of an image (H, W) is none of our convolutions, or None."""
    if geometry.dilation != (1, 1):
        return "dilation"
    is_subpixel = geometry._replace(transposed=True) == SUBPIXEL and tuple(taps) == (4, 4)
    if geometry.transposed or geometry.stride != (1, 1):
        if not is_subpixel:
            return "with strides, its input gradient is for kernel 4, stride 2, padding 1 and no groups"
        if not geometry.transposed and (image[0] % 2 or image[1] % 2):
            return "with strides, its input gradient is for images of even height and width"
    elif any(pad >= size for pad, size in zip(geometry.padding, taps, strict=True)):
        return "padding of the kernel's size"
    return None


def _impl(
    x: Tensor,
    conv_weight: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry((stride_y, stride_x), (pad_y, pad_x), (1, 1), transposed, (0, 0), groups)
    reason = why_not_geometry(geometry, conv_weight.shape[2:], x.shape[2:])
    if reason is not None:
        raise ValueError(f"norm_act_conv_bwd: {reason}")
    _conv_stats.check_prologue("norm_act_conv_bwd", x, mean, invstd, activation)
    operands = weight, bias, mean, invstd, *geometry[0], *geometry[1], groups, transposed
    result: tuple[Tensor, Tensor, Tensor]
    result = dispatch.run("norm_act_conv_bwd", (x, conv_weight, dy, *operands, activation, negative_slope))
    return result


def _fake(
    x: Tensor,
    conv_weight: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    *others: object,
) -> tuple[Tensor, ...]:
    absent = mean.new_empty(0)
    return empty_like(x), *(torch.empty_like(absent if t is None else t) for t in (weight, bias))


norm_act_conv_bwd = opaque(
    "norm_act_conv_bwd(Tensor x, Tensor conv_weight, Tensor dy, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd,"
    " int stride_y, int stride_x, int pad_y, int pad_x, int groups, bool transposed, str activation, float negative_slope)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    impl=_impl,
    fake=_fake,
)
