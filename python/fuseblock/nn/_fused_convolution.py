"""A convolution module that runs together with what stands behind or before it, where `_conv_engine` says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .. import functional
from .._conv_engine import Call, choose, may_choose
from .._convolution import Geometry
from .._library import wants_gradient
from ._weight_hooks import parameter_of, see_calls, weight_of
from .activation import name_of, shows_output, unusual
from .conv import Conv2d, ConvTranspose2d
from .norm_act import BatchNormAct2d, joins


def geometry_of(conv: torch.nn.Module | None) -> Geometry | str:
    """How a convolution of this package runs, or the reason why nothing can run with it."""
    if isinstance(conv, (Conv2d, ConvTranspose2d)) and is_parametrized(conv):
        return "a parametrization makes the weight anew whenever it is read"
    if type(conv) not in (Conv2d, ConvTranspose2d):
        return f"{type(conv).__name__} is no convolution of two dimensions of this package (`fuse` swaps PyTorch's)"
    assert isinstance(conv, (Conv2d, ConvTranspose2d))
    if see_calls(conv._forward_pre_hooks.values()) or shows_output(conv):
        return "somebody sees what the convolution takes or returns"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding is {conv.padding!r}, {conv.padding_mode}"
    return Geometry(
        conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
    )


def call_of(conv: Any, follower: torch.nn.Module | None, x: Tensor) -> Call | str:
    """What conv and the module behind it may run together, or the reason why they run apart."""
    geometry = geometry_of(conv)
    if isinstance(geometry, str):
        return geometry
    if follower is None or unusual(follower):
        return "nothing is behind the convolution that would run with it"
    tensors = x, parameter_of(conv), conv.bias
    if type(follower) is BatchNormAct2d:
        if not follower.takes_statistics or follower.applies:
            return "the norm takes no statistics of this batch alone, or marks what it returns"
        return Call("conv_norm_act", *tensors, geometry)
    activation = name_of(follower)
    if activation is None:
        return "neither batch norm nor activation is behind the convolution"
    return Call("conv_act", *tensors, geometry, activation, getattr(follower, "negative_slope", 0.0))


def call_into(norm: torch.nn.Module, act: torch.nn.Module | None, conv: Any, x: Tensor) -> Call | str:
    """What a norm of x, its activation (None: its own) and conv behind them may run together, or why they run apart."""
    if type(norm) is not BatchNormAct2d or unusual(norm) or not norm.takes_statistics or norm.applies:
        return "before the convolution is no batch norm of this batch alone"
    geometry = geometry_of(conv)
    if isinstance(geometry, str):
        return geometry
    before = norm._activation_arguments(act)
    activation = before["activation"], before["negative_slope"]
    return Call("norm_act_conv", x, parameter_of(conv), conv.bias, geometry, *activation)


def call_at(modules: Sequence[torch.nn.Module], x: Tensor) -> Call | str:
    """What the first of the modules, a norm or a convolution, may run together with those behind it, or why not."""
    first, second, third = [*modules, None, None, None][:3]
    if not isinstance(first, BatchNormAct2d):
        return call_of(first, second, x)
    return call_into(first, second, third, x) if joins(first, second) else call_into(first, None, second, x)


class Decision(NamedTuple):
    """Who runs a convolution and what stands behind or before it.

    Attributes:
        call: what may run together, or the reason why nothing does.
        engine, rule: ``"aten"`` or ``"triton"``, and why.
        takes_statistics: of a norm before a convolution, whether that is ours forward, too, and takes those of the norm
            behind it.
    """

    call: Call | str
    engine: str
    rule: str
    takes_statistics: bool = False


def _decided(call: Call | str) -> Decision:
    if isinstance(call, str):
        return Decision(call, "aten", "the only one that can run")
    return Decision(call, *choose(call))


def behind(conv: Any, followers: Sequence[torch.nn.Module], x: Tensor) -> Decision:
    """Who runs a convolution of x and the module behind it."""
    return _decided(call_of(conv, followers[0] if followers else None, x))


def before(norm: BatchNormAct2d, followers: Sequence[torch.nn.Module], x: Tensor) -> Decision:
    """Who runs the backward of a norm of x and of the convolution behind it."""
    if not wants_gradient((x, norm.weight, norm.bias)):
        return _decided("neither the norm nor its input wants a gradient")
    decision = _decided(call_at([norm, *followers], x))
    if decision.engine != "triton":
        return decision
    conv, *rest = followers[1 if joins(norm, followers[0]) else 0 :]
    call, engine, *_ = behind(conv, rest, x)
    if isinstance(call, str) or engine != "triton":
        return decision
    if call.op == "conv_act":
        return Decision(decision.call, "aten", "an activation in the convolution's epilogue saves more")
    return decision._replace(takes_statistics=True)


def through(
    conv: Any, followers: Sequence[torch.nn.Module], x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """(result, number of followers in it) of conv and modules behind it; None where PyTorch's convolution is to run.

    ``residual`` is added by the last follower, a norm.
    """
    if not may_choose(x) or not followers:
        return None
    call, engine, *_ = behind(conv, followers, x)
    if isinstance(call, str) or engine != "triton":
        return None
    _, _, _, bias, geometry, activation, negative_slope = call
    with weight_of(conv, x) as weight:
        if call.op == "conv_norm_act":
            y, *statistics = _with_statistics(x, weight, bias, geometry)
        elif geometry.transposed:
            return functional.conv_transpose2d_act(x, weight, bias, activation, negative_slope), 1
        else:
            shape = geometry.stride, geometry.padding, geometry.groups
            return functional.conv2d_act(x, weight, bias, *shape, activation, negative_slope), 1
    return _normalised(followers, y, residual, (statistics[0], statistics[1]))


def _with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution with mean and variance of its result."""
    if geometry.transposed:
        return functional.conv_transpose2d_subpixel(x, weight, bias)
    return functional.conv2d_stats(x, weight, bias, geometry.stride, geometry.padding)


def _normalised(
    modules: Sequence[torch.nn.Module],
    x: Tensor,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor],
) -> tuple[Tensor, int]:
    """(result, number of modules in it) of a norm and modules behind it, of x with these statistics."""
    norm, *followers = modules
    assert isinstance(norm, BatchNormAct2d)
    fused = into_convolution(norm, followers, x, residual, statistics)
    if fused is not None:
        return fused[0], 1 + fused[1]
    act = followers[0] if followers and joins(norm, followers[0]) else None
    added = None if followers else residual
    return norm.activated(x, act, added, statistics), 1 if act is None else 2


def into_convolution(
    norm: BatchNormAct2d,
    followers: Sequence[torch.nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, int] | None:
    """(result, number of followers in it) of a norm whose backward runs with that of the convolution behind it.

    None where both are to run apart. ``residual`` is added by the last follower, a norm. ``statistics``: mean and variance
    of x, where its producer gives them.
    """
    if not may_choose(x):
        return None
    call, engine, _, takes_statistics = before(norm, followers, x)
    if isinstance(call, str) or engine != "triton":
        return None
    conv, *rest = followers[1 if joins(norm, followers[0]) else 0 :]

    def convolve(a: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        if takes_statistics:
            return _with_statistics(a, weight, bias, call.geometry)
        return (torch.convolution(a, weight, bias, *call.geometry),)

    with weight_of(conv, x) as weight:  # type: ignore[arg-type]
        y, *of_y = norm.convolved(x, call._replace(weight=weight), convolve, statistics)
    taken = len(followers) - len(rest)
    if not of_y:
        return y, taken
    result, more = _normalised(rest, y, residual, (of_y[0], of_y[1]))
    return result, taken + more
