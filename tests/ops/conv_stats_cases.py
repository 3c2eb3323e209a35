"""What the tests of convolutions with statistics share: the list of checks, for a function and its plain composition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import fuseblock
from fuseblock._activations import activate

from ..backends import Forced
from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: The operators' last arguments where nothing is before the convolution.
NO_PROLOGUE = None, None, "identity", 0.0
LAYOUTS = {"rows": torch.contiguous_format, "channels_last": torch.channels_last}

Convolution = Callable[..., Any]


def call(forced: Forced, function: Convolution, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with fuseblock.backend(forced.name):
        y, mean, var = function(*(a.to(forced.device) if isinstance(a, Tensor) else a for a in args))
    return y.cpu(), mean.cpu(), var.cpu()


def with_stats(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, mean, var


def check_values(forced: Forced, ours: Convolution, stock: Convolution, *args: Any) -> None:
    """y within the bound, and the statistics of y as it came out."""
    x = args[0]
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    want, plain = stock(*wide), stock(*args)
    with poisoned_outputs():
        y, mean, var = call(forced, ours, *args)
    sum_length = 4 * args[1].numel() // args[1].shape[0] + 16
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert y.is_contiguous(memory_format=_format(x))
    assert error_ratio(y, want, relative_error(plain, want), sum_length) <= 1
    assert mean.dtype == var.dtype == state_dtype(x.dtype)
    _, mean64, var64 = with_stats(y.double())
    _, mean_stock, var_stock = with_stats(y.to(mean.dtype))
    stock_error = max(relative_error(mean_stock, mean64), relative_error(var_stock, var64))
    assert error_ratio(mean, mean64, stock_error, y.numel()) <= 1
    assert error_ratio(var, var64, stock_error, y.numel()) <= 1


def _format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def check_prologue(
    forced: Forced, ours: Convolution, stock: Convolution, x: Tensor, w: Tensor, b: Tensor
) -> None:
    """Values with every activation, and both orders of gradient of all operands; ``ours`` takes the prologue by name."""
    channels = x.shape[1]
    scale, shift = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)

    def run(activation: str, x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return ours(x, w, b, scale=scale, shift=shift, activation=activation, negative_slope=0.2)

    def plain(activation: str, x: Tensor, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Any:
        z = x * scale[:, None, None] + shift[:, None, None]
        return stock(activate(z, activation, 0.2).to(x.dtype), w, b)

    for dtype, activation in (
        (torch.float64, "identity"),
        (torch.float32, "silu"),
        (torch.float16, "leaky_relu"),
        (torch.bfloat16, "relu"),
    ):
        affine = (t.to(state_dtype(dtype)) for t in (scale, shift))
        tensors = *(t.to(dtype) for t in (x, w, b)), *affine
        check_values(forced, partial(run, activation), partial(plain, activation), *tensors)
    leaves = tuple(t.double().requires_grad_() for t in (x, w, b, scale, shift))

    def derivatives(function: Convolution) -> list[Tensor]:
        y, mean, var = function(*leaves)
        loss = (y.pow(3).mean((0, 2, 3)) + mean * var).sum()
        first = grad(loss, leaves, create_graph=True)
        return [*first, *grad(sum(g.pow(2).sum() for g in first), leaves)]

    ours_of = partial(call, forced, partial(run, "tanh"))
    for got, want in zip(
        derivatives(ours_of), derivatives(lambda *t: with_stats(plain("tanh", *t))), strict=True
    ):
        assert relative_error(got, want) < 1e-10


def check_gradients(
    forced: Forced, ours: Convolution, stock: Convolution, x: Tensor, w: Tensor, b: Tensor
) -> None:
    """First and second order by finite differences, third order against the plain composition."""
    leaves = tuple(t.double().requires_grad_() for t in (x, w, b))

    def run(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return call(forced, ours, *args)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    def third(function: Convolution) -> list[Tensor]:
        def normalised(*args: Tensor) -> Tensor:
            y, mean, var = function(*args)
            return (y - mean[:, None, None]) * (var + 0.1).rsqrt()[:, None, None]

        first = grad(normalised(*leaves).pow(3).sum(), leaves[:2], create_graph=True)
        second = grad(sum(g.pow(3).sum() for g in first), leaves[:2], create_graph=True)
        return list(grad(sum(g.pow(2).sum() for g in second), leaves[:2]))

    for got, want in zip(third(run), third(lambda *args: with_stats(stock(*args))), strict=True):
        assert relative_error(got, want) < 1e-10


class Masks(TorchDispatchMode):
    """Records which gradients convolutions were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def check_masks(ours: Convolution, x: Tensor, w: Tensor) -> None:
    """Only what is asked for is computed, as in PyTorch's convolution."""
    x, w = x.requires_grad_(), w.requires_grad_()
    for wanted, mask in (([x], [True, False, False]), ([w], [False, True, False])):
        outputs = ours(x, w)
        with Masks() as masks:
            grad(sum(o.square().sum() for o in outputs), wanted)
        assert masks.seen == [mask]
    y, mean, _ = ours(x, w)
    with Masks() as masks:
        assert grad(mean.sum(), [y], allow_unused=True) == (None,)
    assert masks.seen == []


def check_batch_norm(forced: Forced, ours: Convolution, stock: Convolution, x: Tensor, w: Tensor) -> None:
    """The statistics are those that a batch norm takes, gradients included."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y, mean, var = call(forced, ours, x, w)
    z = (y - mean[:, None, None]) * (var + 1e-5).rsqrt()[:, None, None]
    want = F.batch_norm(stock(x, w), None, None, training=True)
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-11)
    for got, expected in zip(grad(z.pow(3).sum(), [x, w]), grad(want.pow(3).sum(), [x, w]), strict=True):
        assert relative_error(got, expected) < 1e-9
