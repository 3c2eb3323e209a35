"""Convolutions: forward and first gradients to the bit PyTorch's, second and higher orders right and no more than asked."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fuseblock import functional

from .ops.lstm_cases import error_ratio, relative_error
from .test_convolution_penalties import WEIGHT_ALONE, Recorder


class Case(NamedTuple):
    function: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    bias: bool = True

    @property
    def longest_sum(self) -> int:
        return torch.Size(self.x).numel() + torch.Size(self.w).numel()

    def tensors(self, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor | None]:
        """x, w, b and cotangents of y, dx, dw, db, all of which require gradients."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if layout == "channels_last" and values.dim() == 4:
                values = values.contiguous(memory_format=torch.channels_last)
            return values.requires_grad_()

        x, w = normal(*self.x), normal(*self.w)
        groups = self.options.get("groups", 1)
        outputs = self.w[1] * groups if "transpose" in self.function else self.w[0]
        b = normal(outputs) if self.bias else None
        y = getattr(F, self.function)(x, w, b, **self.options)
        cotangents = [normal(*y.shape), normal(*self.x), normal(*self.w)]
        return [x, w, b, *cotangents, normal(outputs) if self.bias else None]


CASES = {
    "1x1": Case("conv2d", (2, 3, 4, 5), (4, 3, 1, 1)),
    "stride": Case("conv2d", (2, 3, 7, 6), (4, 3, 4, 3), {"stride": (2, 3), "padding": (1, 0)}),
    "rest": Case("conv2d", (1, 2, 8, 8), (3, 2, 3, 3), {"stride": 2}, bias=False),
    "same": Case("conv2d", (2, 3, 5, 7), (4, 3, 3, 3), {"padding": "same", "dilation": 2}),
    "same, even": Case("conv2d", (2, 3, 5, 7), (4, 3, 2, 2), {"padding": "same"}),
    "valid": Case("conv2d", (2, 3, 5, 7), (4, 3, 3, 3), {"padding": "valid"}),
    "groups": Case("conv2d", (2, 6, 5, 4), (4, 3, 3, 3), {"groups": 2, "padding": 1, "dilation": (1, 2)}),
    "aligned groups": Case("conv2d", (2, 16, 5, 4), (16, 8, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": Case("conv2d", (2, 5, 6, 5), (5, 1, 3, 3), {"groups": 5, "padding": 1}),
    "unbatched": Case("conv2d", (3, 5, 4), (4, 3, 3, 3), {"padding": 1}),
    "large kernel": Case("conv2d", (3, 2, 4, 4), (1, 2, 4, 4)),
    "conv1d": Case("conv1d", (2, 4, 9), (6, 2, 4), {"stride": 2, "padding": 1, "groups": 2}),
    "transposed": Case("conv_transpose2d", (2, 3, 4, 3), (3, 5, 4, 4), {"stride": 2, "padding": 1}),
    "output_padding": Case(
        "conv_transpose2d",
        (2, 4, 3, 4),
        (4, 3, 3, 3),
        {"stride": (2, 3), "output_padding": (1, 2), "groups": 2, "dilation": 2},
    ),
    "transposed, unbatched": Case("conv_transpose2d", (3, 4, 3), (3, 2, 2, 2), {"stride": 2}, bias=False),
    "conv_transpose1d": Case("conv_transpose1d", (2, 4, 5), (4, 3, 4), {"stride": 2, "padding": 1}),
}


def _steps(x: Tensor) -> list[int]:
    """The strides that matter: of dimensions with more than one element."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


def function_of(case: Case, of: Any = functional) -> Callable[..., Tensor]:
    return partial(getattr(of, case.function), **case.options)


def first_order(of: Any, case: Case, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [x, w] if b is None else [x, w, b]
    y = function_of(case, of)(x, w, b)
    return [y, *torch.autograd.grad(y, leaves, dy, create_graph=True)]


def second_order(of: Any, case: Case, tensors: list[Tensor | None]) -> list[Tensor]:
    """Gradients with respect to x, w, dy of <v, (dx, dw, db)>."""
    x, w, b, dy, *v = tensors
    _, *gradients = first_order(of, case, x, w, b, dy)
    given = [c for c in v if c is not None]
    return list(torch.autograd.grad(gradients, (x, w, dy), given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_first_order_is_pytorchs(name: str, layout: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, w, b, dy, *_ = case.tensors(dtype, layout)
    got, want = (first_order(of, case, x, w, b, dy) for of in (functional, F))
    for g, v in zip(got, want, strict=True):
        assert torch.equal(g, v) and g.dtype == v.dtype and _steps(g) == _steps(v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_second_order(name: str, layout: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = case.tensors(dtype, layout)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = second_order(F, case, exact)
    stock = second_order(F, case, tensors)
    stock_error = max(relative_error(s, w) for s, w in zip(stock, want, strict=True))
    for label, g, w in zip(
        ("a_x", "a_w", "a_dy"), second_order(functional, case, tensors), want, strict=True
    ):
        assert g.dtype == dtype and g.shape == w.shape
        assert error_ratio(g, w, stock_error, case.longest_sum) <= 1, label


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", ["stride", "output_padding"])
def test_some_cotangents(name: str, given: tuple[int, ...]) -> None:
    """The gradients of some of dx, dw, db alone."""
    case = CASES[name]
    x, w, b, dy, *v = case.tensors(torch.float64)
    found = []
    for of in (functional, F):
        _, *gradients = first_order(of, case, x, w, b, dy)
        picked = [gradients[k] for k in given], (x, w, dy), [v[k] for k in given]
        found.append(torch.autograd.grad(*picked, allow_unused=True, materialize_grads=True))
    for got, want in zip(*found, strict=True):
        assert error_ratio(got, want, 0.0, case.longest_sum) <= 1


TINY = {
    "stride": Case("conv2d", (2, 2, 3, 4), (2, 2, 2, 3), {"stride": (1, 2), "padding": 1}),
    "groups": Case("conv2d", (1, 4, 3, 2), (4, 2, 2, 2), {"groups": 2, "padding": 1, "dilation": 2}),
    "transposed": Case("conv_transpose2d", (1, 2, 2, 2), (2, 1, 2, 3), {"stride": 2, "groups": 2}),
    "unbatched": Case("conv1d", (2, 4), (2, 2, 3), {"padding": 1}),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", TINY)
def test_derivatives_of_every_order(name: str, layout: str) -> None:
    """First to third: gradgradcheck of the gradient."""
    case = TINY[name]
    x, w, b, dy, *_ = case.tensors(torch.float64, layout)
    assert gradcheck(function_of(case), (x, w, b))
    assert gradgradcheck(function_of(case), (x, w, b))

    def gradients(x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
        return first_order(functional, case, x, w, b, dy)[1:]

    assert gradgradcheck(gradients, (x, w, b, dy))


def test_nothing_is_computed_for_a_gradient_that_is_not_used() -> None:
    """dx and dw were both taken, and dx alone is differentiated: the term of dw is absent, not zero."""
    case = CASES["groups"]
    x, w, b, dy, v_x, *_ = case.tensors(torch.float64)
    _, dx, _, _ = first_order(functional, case, x, w, b, dy)
    with Recorder() as recorder:
        found = torch.autograd.grad(dx, (x, w, dy), v_x, allow_unused=True)
    assert found[0] is None and recorder.masks == {WEIGHT_ALONE: 1} and recorder.forwards == 1


@pytest.mark.parametrize("wanted", ["dy", "w", "x"])
def test_second_order_computes_what_is_wanted(wanted: str) -> None:
    case = CASES["groups"]
    x, w, _, dy, v_x, v_w, _ = case.tensors(torch.float64)
    _, dx, dw, _ = first_order(
        functional, case, x, w, torch.zeros(4, dtype=torch.float64).requires_grad_(), dy
    )
    with Recorder() as recorder:
        torch.autograd.grad((dx, dw), {"dy": dy, "w": w, "x": x}[wanted], (v_x, v_w))
    expected = {"dy": Counter(), "w": Counter({WEIGHT_ALONE: 1}), "x": Counter({(True, False, False): 1})}
    assert recorder.masks == expected[wanted]
    assert recorder.forwards == (2 if wanted == "dy" else 0)


def test_all_is_computed_where_the_engine_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(node: Any) -> bool:
        raise RuntimeError("only in a backward")

    monkeypatch.setattr(torch._C, "_will_engine_execute_node", refuse)
    case = CASES["stride"]
    tensors = case.tensors(torch.float64)
    for got, want in zip(
        second_order(functional, case, tensors), second_order(F, case, tensors), strict=True
    ):
        assert error_ratio(got, want, 0.0, case.longest_sum) <= 1


def test_reentrant_checkpoint() -> None:
    case = CASES["stride"]
    x, w, b, *_ = case.tensors(torch.float64)
    y = checkpoint(function_of(case), x, w, b, use_reentrant=True)
    got = torch.autograd.functional.vjp(
        lambda *args: function_of(case)(*args), (x, w, b), torch.ones_like(y)
    )[1]
    y.sum().backward()
    for leaf, want in zip((x, w, b), got, strict=True):
        assert torch.equal(leaf.grad, want)


def test_graph_is_freed() -> None:
    """No cycle through autograd nodes, which the garbage collector cannot see."""
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, requires_grad=True)
    hidden = x * 1
    y = functional.conv2d(hidden, w)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.autograd.grad(slope.square().sum(), w, create_graph=True)
    alive = weakref.ref(hidden)
    del hidden, y, slope
    gc.collect()
    assert alive() is None


def test_second_backward_and_changed_inputs_raise() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    y = functional.conv2d(x, w).square()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    dy = torch.ones(1, 2, 2, 2, requires_grad=True)
    (dw,) = torch.autograd.grad(functional.conv2d(x, w), w, dy, create_graph=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dw.sum().backward()


def test_transforms() -> None:
    x, w = torch.randn(3, 2, 5, 5), torch.randn(4, 2, 3, 3)

    def loss(of: Any, w: Tensor, x: Tensor) -> Tensor:
        return of.conv2d(x, w, padding=1).tanh().sum()

    def penalty(of: Any, w: Tensor, x: Tensor) -> Tensor:
        return torch.func.grad(loss, 2)(of, w, x).square().sum()

    for transform in (
        lambda of: torch.func.vmap(torch.func.grad(partial(loss, of)), (None, 0))(w, x),
        lambda of: torch.func.vmap(torch.func.grad(partial(penalty, of)), (None, 0))(w, x),
        lambda of: torch.func.jvp(partial(loss, of), (w, x), (w, x))[1],
        lambda of: torch.func.jvp(torch.func.grad(partial(loss, of)), (w, x), (w, x))[1],
        lambda of: torch.autograd.functional.hvp(lambda w: loss(of, w, x), w, w)[1],
    ):
        torch.testing.assert_close(transform(functional), transform(F))


def test_forward_over_reverse() -> None:
    found = []
    for of in (functional, F):
        w = torch.ones(1, 1, 2, 2, requires_grad=True)
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(torch.ones(1, 1, 3, 3), torch.full((1, 1, 3, 3), 2.0))
            (dw,) = torch.autograd.grad(of.conv2d(x, w).square().sum(), w, create_graph=True)
            found.append(torch.autograd.forward_ad.unpack_dual(dw).tangent)
    assert found[0] is not None and torch.equal(*found)


def test_batched_cotangents() -> None:
    x, w = torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    cotangents = torch.randn(5, 2, 3, 2, 2)
    found = []
    for of in (functional, F):
        (dw,) = torch.autograd.grad(of.conv2d(x, w), w, cotangents, is_grads_batched=True, create_graph=True)
        found.append((dw, *torch.autograd.grad(dw.square().sum(), x)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_compile_fullgraph() -> None:
    def run(of: Any, x: Tensor, w: Tensor, up: Tensor) -> Tensor:
        return of.conv_transpose2d(of.conv2d(x, w, padding="same").relu(), up, stride=2)

    compiled = torch.compile(partial(run, functional), fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 2, 2)]
    found = []
    for call in (compiled, partial(run, F)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = call(*leaves)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_jit_trace() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    traced = torch.jit.trace(functional.conv2d, (x, w))
    torch.testing.assert_close(traced(x + 1, w), F.conv2d(x + 1, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    case = CASES["stride"]
    x, w, b, dy, v_x, *_ = case.tensors(torch.float32)
    found = []
    for of in (functional, F):
        with torch.autocast("cpu", dtype):
            y = function_of(case, of)(x, w, b)
        assert y.dtype == dtype
        (dx,) = torch.autograd.grad(y, x, dy.to(dtype), create_graph=True)
        assert dx.dtype == torch.float32
        found.append((y, dx, *torch.autograd.grad(dx, w, v_x)))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.float(), want.float(), rtol=2 ** (-6), atol=2 ** (-6))


def test_complex_numbers_stay_with_pytorch() -> None:
    x, w = torch.randn(1, 2, 4, 4, dtype=torch.complex64), torch.randn(2, 2, 3, 3, dtype=torch.complex64)
    found = []
    for of in (functional, F):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        (dx,) = torch.autograd.grad(of.conv2d(*leaves).abs().square().sum(), leaves[0], create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.abs().square().sum(), leaves)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_no_rows() -> None:
    x, w = torch.empty(0, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(functional.conv2d(x, w).sum(), x, create_graph=True)
    (dw,) = torch.autograd.grad(dx.sum(), w)
    assert dx.shape == x.shape and not dw.any()


def test_nothing_is_hooked_without_a_gradient() -> None:
    with torch.no_grad():
        assert functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)).grad_fn is None


BAD = {
    "channels": lambda of: of.conv2d(torch.ones(1, 3, 4, 4), torch.ones(2, 2, 3, 3)),
    "groups": lambda of: of.conv2d(torch.ones(1, 4, 4, 4), torch.ones(3, 2, 3, 3), groups=2),
    "no groups": lambda of: of.conv2d(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 3, 3), groups=0),
    "transposed channels": lambda of: of.conv_transpose2d(torch.ones(1, 3, 4, 4), torch.ones(2, 2, 3, 3)),
    "bias": lambda of: of.conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), torch.ones(3)),
    "dtype": lambda of: of.conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3, dtype=torch.float64)),
    "bias dtype": lambda of: of.conv2d(
        torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), torch.ones(2, dtype=torch.float64)
    ),
    "kernel": lambda of: of.conv2d(torch.ones(1, 2, 2, 2), torch.ones(2, 2, 3, 3)),
    "dimensions": lambda of: of.conv2d(torch.ones(2, 2), torch.ones(2, 2, 3, 3)),
    "same": lambda of: of.conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), stride=2, padding="same"),
    "padding": lambda of: of.conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), padding="reflect"),
    "output_padding": lambda of: of.conv_transpose2d(
        torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), output_padding=1
    ),
    "1d": lambda of: of.conv1d(torch.ones(1, 3, 4), torch.ones(2, 2, 3)),
    "transposed 1d": lambda of: of.conv_transpose1d(torch.ones(1, 3, 4), torch.ones(2, 2, 3)),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_pytorchs(what: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as stock:
        BAD[what](F)
    with pytest.raises(stock.type) as ours:
        BAD[what](functional)
    assert str(ours.value) == str(stock.value)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"conv2d\(\) received an invalid combination of arguments"):
        functional.conv2d([1.0], torch.ones(2, 2, 3, 3))


@pytest.mark.parametrize("other", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_devices(other: str) -> None:
    """PyTorch's takes a meta weight for one of the input's device, and returns memory that nobody has written."""
    x, w = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3, device=other)
    with pytest.raises(RuntimeError, match=f"expected weight on cpu, as input, got {other}"):
        functional.conv2d(x, w)
