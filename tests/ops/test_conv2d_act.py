"""Operator conv2d_act on its backends: values, derivatives of every order, layouts, transforms, errors."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import dispatch, functional
from fuseblock._activations import activate

from ..backends import Forced, available
from . import conv_stats_cases as cases
from .bounds import error_ratio, poisoned_outputs, relative_error
from .conv_stats_cases import DTYPES, LAYOUTS
from .test_conv2d_stats import forced as forced
from .test_conv2d_stats import small_blocks as small_blocks

#: x, weight, stride, padding, groups; None: transposed
CASES: dict[str, Any] = {
    "from an image": ((2, 3, 9, 8), (17, 3, 4, 4), 2, 1, 1),
    "to an image": ((1, 33, 5, 7), (3, 33, 3, 3), 1, 1, 1),
    "groups": ((2, 10, 5, 4), (15, 2, 3, 3), (2, 1), (0, 2), 5),
    "wide groups": ((1, 34, 3, 3), (38, 17, 3, 3), 1, 1, 2),
    "to an image, transposed": ((1, 20, 3, 5), (20, 3, 4, 4), None),
}
ACTIVATIONS = {"identity": 0.0, "relu": 0.0, "leaky_relu": 0.2, "tanh": 0.0}


def functions(case: str, activation: str = "leaky_relu", slope: float = 0.2) -> tuple[Any, Any]:
    """Ours and the plain composition, of x, weight and bias."""
    _, _, *geometry = CASES[case]
    transposed = geometry == [None]

    def ours(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if transposed:
            return functional.conv_transpose2d_act(x, w, b, activation, slope)
        return functional.conv2d_act(x, w, b, *geometry, activation, slope)

    def stock(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if transposed:
            return activate(F.conv_transpose2d(x, w, b, 2, 1), activation, slope)
        stride, padding, groups = geometry
        return activate(F.conv2d(x, w, b, stride, padding, 1, groups), activation, slope)

    return ours, stock


def inputs(case: str, dtype: torch.dtype, layout: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    shape, weight, *geometry = CASES[case]
    out = weight[1] if geometry == [None] else weight[0]
    x, w, b = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, weight, (out,)))
    return x.contiguous(memory_format=LAYOUTS[layout]), w, b


def run(forced: Forced, function: Any, *args: Tensor) -> Tensor:
    with fuseblock.backend(forced.name):
        y: Tensor = function(*(t.to(forced.device) for t in args))
    return y.cpu()


def check(forced: Forced, ours: Any, stock: Any, x: Tensor, *others: Tensor) -> None:
    want, plain = stock(x.double(), *(t.double() for t in others)), stock(x, *others)
    with poisoned_outputs():
        y = run(forced, ours, x, *others)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert y.is_contiguous(memory_format=cases._format(x))
    assert error_ratio(y, want, relative_error(plain, want), 4 * others[0].numel() + 16) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values(forced: Forced, case: str, layout: str) -> None:
    for dtype in DTYPES:
        check(forced, *functions(case), *inputs(case, dtype, layout))
    x, w, b = inputs(case, torch.float32, layout)
    check(forced, *functions(case), x, w)
    for activation, slope in ACTIVATIONS.items():
        check(forced, *functions(case, activation, slope), x, w, b)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_blocks(layout: str) -> None:
    with available("triton") as triton:
        for case in ("wide groups", "to an image, transposed"):
            check(triton, *functions(case), *inputs(case, torch.float32, layout))


def test_gradients_of_every_order(forced: Forced) -> None:
    every = itertools.product(("leaky_relu", "tanh"), (False, True))
    # Backward is the same on every backend.
    for activation, transposed in (("tanh", False),) if forced.name == "triton" else every:
        case = "to an image, transposed" if transposed else "groups"
        shapes = ((2, 2, 2, 2), (2, 3, 4, 4), (3,)) if transposed else ((1, 10, 4, 3), (5, 2, 3, 3), (5,))
        leaves = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
        function = partial(run, forced, functions(case, activation)[0])
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_third_order() -> None:
    x, w, b = (t.requires_grad_() for t in inputs("groups", torch.float64))

    def third(function: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x, w, b).pow(3).sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), (x, w, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in second), (x, w, b))

    for activation, slope in ACTIVATIONS.items():
        ours, stock = functions("groups", activation, slope)
        for got, want in zip(third(ours), third(stock), strict=True):
            assert relative_error(got, want) < 1e-10


def test_only_the_gradients_asked_for() -> None:
    x, w, b = (t.requires_grad_() for t in inputs("groups", torch.float64))
    ours, _ = functions("groups")
    for wanted, mask in (([x], [True, False, False]), ([w], [False, True, False]), ([b], None)):
        y = ours(x, w, b)
        with cases.Masks() as masks:
            torch.autograd.grad(y.square().sum(), wanted)
        assert masks.seen == ([] if mask is None else [mask])


def test_a_penalty_alone_runs_no_zeros_through_the_network() -> None:
    x, w, b = (t.requires_grad_() for t in inputs("groups", torch.float64))
    y = functions("groups")[0](x, w, b)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with cases.Masks() as masks:
        assert torch.autograd.grad(dx.sum(), (x, b), allow_unused=True, retain_graph=True) == (None, None)
        torch.autograd.grad(dx.square().sum(), w)
    assert masks.seen == [[False, True, False]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    x, w, b = (t.requires_grad_() for t in inputs("groups", torch.float64, layout))
    for bias in (b, None):
        args = x, w, bias, 2, 1, 1, 0, 5, False, "tanh", 0.0
        torch.library.opcheck(torch.ops.fuseblock.conv2d_act.default, args)


def test_transforms_and_autocast() -> None:
    x, w, b = inputs("groups", torch.float64)
    ours, stock = functions("groups")

    def loss(function: Any, x: Tensor) -> Tensor:
        return function(x[None], w, b).square().sum()

    got = torch.vmap(torch.func.grad(partial(loss, ours)))(x)
    torch.testing.assert_close(got, torch.vmap(torch.func.grad(partial(loss, stock)))(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.float(), w.float(), b.float()).dtype is torch.bfloat16


def test_it_runs_on_pytorch_where_there_is_no_gpu() -> None:
    args = (torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), None, 1, 1, 0, 0, 1, False, "relu", 0.0)
    assert dispatch.choose("conv2d_act", args).name == "reference"


def test_bad_input() -> None:
    x, w = torch.randn(1, 4, 4, 4), torch.randn(6, 2, 3, 3)
    act, up = functional.conv2d_act, functional.conv_transpose2d_act
    for error, message, call in (
        (ValueError, r"x of shape \(N, 2, H, W\)", lambda: act(x, w)),
        (ValueError, "groups that divide 6", lambda: act(x, w, groups=4)),
        (ValueError, "weight with 4 dimensions", lambda: act(x, w[0])),
        (ValueError, "an activation among", lambda: act(x, w, groups=2, activation="silu")),
        (ValueError, "negative_slope of at least 0", lambda: act(x, w, groups=2, negative_slope=-1.0)),
        (ValueError, r"bias of shape \(6,\)", lambda: act(x, w, torch.ones(2), groups=2)),
        (TypeError, "weight of dtype torch.float32", lambda: act(x, w.double(), groups=2)),
        (ValueError, "no values", lambda: act(x[..., :1], w, groups=2)),
        (ValueError, "stride of at least 1", lambda: act(x, w, None, 0, groups=2)),
        (ValueError, "padding as one number or two", lambda: act(x, w, None, 1, (1, 2, 3))),
        (
            TypeError,
            "conv2d_act: expected stride of integers, got 1.5",
            lambda: act(x, w, None, 1.5, groups=2),
        ),
        (ValueError, "expected kernel 4, stride 2", lambda: up(x, torch.randn(4, 6, 3, 3))),
        (ValueError, r"x of shape \(N, 6, H, W\)", lambda: up(x, torch.randn(6, 6, 4, 4))),
    ):
        with pytest.raises(error, match=message):
            call()
