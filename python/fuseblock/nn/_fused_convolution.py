"""A convolution module that runs together with what stands behind it, where `_conv_engine` says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._conv_engine import Call, choose, may_choose
from .._convolution import Geometry
from .activation import name_of, shows_output, unusual
from .conv import Conv2d, ConvTranspose2d
from .norm_act import BatchNormAct2d, joins


def call_of(conv: Any, follower: torch.nn.Module | None, x: Tensor) -> Call | str:
    """What conv and the module behind it may run together, or the reason why they run apart."""
    if type(conv) not in (Conv2d, ConvTranspose2d):
        return f"{type(conv).__name__} is no convolution of two dimensions of this package (`fuse` swaps PyTorch's)"
    if conv._forward_pre_hooks or shows_output(conv):
        return "somebody sees what the convolution takes or returns"
    if follower is None or unusual(follower):
        return "nothing is behind the convolution that would run with it"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding is {conv.padding!r}, {conv.padding_mode}"
    geometry = Geometry(
        conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
    )
    tensors = x, conv.weight, conv.bias
    if type(follower) is BatchNormAct2d:
        if not follower.takes_statistics or follower.applies:
            return "the norm takes no statistics of this batch alone, or marks what it returns"
        return Call("conv_norm_act", *tensors, geometry)
    activation = name_of(follower)
    if activation is None:
        return "neither batch norm nor activation is behind the convolution"
    return Call("conv_act", *tensors, geometry, activation, getattr(follower, "negative_slope", 0.0))


def through(
    conv: Any, followers: Sequence[torch.nn.Module], x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """(result, number of followers in it) of conv and modules behind it; None where PyTorch's convolution is to run.

    ``residual`` is added by a norm that is the only follower.
    """
    if not may_choose(x) or not followers:
        return None
    norm = followers[0]
    call = call_of(conv, norm, x)
    if isinstance(call, str) or choose(call)[0] != "triton":
        return None
    _, _, weight, bias, geometry, activation, negative_slope = call
    if isinstance(norm, BatchNormAct2d):
        if geometry.transposed:
            y, *statistics = functional.conv_transpose2d_subpixel(x, weight, bias)
        else:
            y, *statistics = functional.conv2d_stats(x, weight, bias, geometry.stride, geometry.padding)
        act = followers[1] if len(followers) > 1 and joins(norm, followers[1]) else None
        mean, var = statistics
        return norm.activated(y, act, residual, (mean, var)), 1 if act is None else 2
    if geometry.transposed:
        return functional.conv_transpose2d_act(x, weight, bias, activation, negative_slope), 1
    shape = geometry.stride, geometry.padding, geometry.groups
    return functional.conv2d_act(x, weight, bias, *shape, activation, negative_slope), 1
