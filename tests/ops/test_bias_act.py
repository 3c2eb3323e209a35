"""Operator bias_act on every backend: values, derivatives of every order, masks, layouts, transforms, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import functional, ops
from fuseblock._activations import NAMES
from fuseblock.reference.bias_act import per_channel

from ..backends import Forced
from .bounds import Orders, check_orders, poisoned_outputs, state_dtype

FAMILY = "bias_act"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SLOPE, GAIN, CLAMP = 0.2, 1.3, 0.77
CASES = [
    ("identity", CLAMP),
    ("relu", math.inf),
    ("relu", CLAMP),
    ("leaky_relu", math.inf),
    ("leaky_relu", CLAMP),
    ("prelu", CLAMP),
    ("silu", CLAMP),
    ("tanh", math.inf),
    ("elu", math.inf),
]
SHAPES = [
    (3, 5, 5, 7),
    (1, 3, 33, 31),
    (3, 96, 1, 1),
    (2, 1, 4, 4),
    (5, 3),
    (2, 5, 9),
    (2, 3, 2, 3, 4),
    (1, 96, 8, 8),
]
KEEP_X = ("prelu", "silu", "tanh", "elu")


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Problem:
    """Operands of all three operators in float64, cast on request; values that a dtype holds exactly."""

    def __init__(
        self,
        shape: tuple[int, ...],
        activation: str,
        clamp: float = math.inf,
        dtype: torch.dtype = torch.float64,
        last: bool = False,
    ) -> None:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64).to(dtype).double()

        def image() -> Tensor:
            return channels_last(normal(*shape)) if last else normal(*shape)

        c = shape[1]
        self.activation, self.clamp, self.dtype, self.shape = activation, clamp, dtype, shape
        self.x, self.dy, self.v = image(), image(), image()
        self.bias, self.v_bias = normal(c), normal(c)
        # PyTorch's second order of prelu takes z = 0 for positive, its first order for negative.
        self.x += per_channel(self.bias, self.x).add(self.x) == 0
        self.slope = normal(c).abs() if activation == "prelu" else None
        self.v_slope = normal(c) if activation == "prelu" else None
        self.last = last and not self.x.is_contiguous()
        self.keeps_x = activation in KEEP_X
        self.constants = (activation, SLOPE, GAIN, clamp)
        self.arguments = shape, activation, clamp, dtype, last

    def again(self) -> Problem:
        """The same with other random numbers."""
        return Problem(*self.arguments)

    def cast(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.dtype)

    def stock(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Values, first and second derivatives of what users write by hand."""
        tensors = [t for t in (self.x, self.bias, self.slope) if t is not None]
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        dy = self.dy.to(dtype).requires_grad_()
        y = composite(*leaves, *([None] if self.slope is None else []), *self.constants)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        cotangents = [t.to(dtype) for t in (self.v, self.v_bias, self.v_slope) if t is not None]
        wanted = [dy, *(leaves if self.keeps_x else [])]
        second = torch.autograd.grad(first, wanted, cotangents)
        return [[y], list(first), list(second)]

    def run(self, forced: Forced) -> list[list[Tensor]]:
        """The same by the three operators."""
        x, bias, slope = (self.cast(t) for t in (self.x, self.bias, self.slope))
        with poisoned_outputs():
            y, mask = forced.bias_act(x, bias, slope, *self.constants, True)
            saved = (x, bias, slope) if self.keeps_x else (None, None, None)
            dy, v = self.cast(self.dy), self.cast(self.v)
            first = forced.bias_act_bwd(dy, *saved, mask, *self.constants, self.last, True)
            cotangents = (v, self.cast(self.v_bias), self.cast(self.v_slope))
            dy = dy if self.keeps_x else None
            second = forced.bias_act_bwd_bwd(*cotangents, dy, *saved, mask, *self.constants, self.last)
        return [[y], [t for t in first if t.numel()], [t for t in second if t.numel()]]


def composite(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    z = x if bias is None else x + bias.view(1, -1, *(1,) * (x.dim() - 2))
    function: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda z: z,
        "relu": F.relu,
        "leaky_relu": lambda z: F.leaky_relu(z, negative_slope),
        "prelu": lambda z: F.prelu(z, slope),
        "silu": F.silu,
        "tanh": torch.tanh,
        "elu": F.elu,
    }
    y = function[activation](z) * gain
    return y.clamp(-clamp, clamp) if math.isfinite(clamp) else y


def check(problem: Problem, forced: Forced) -> None:
    def run(draw: int) -> Orders:
        drawn = problem if draw == 0 else problem.again()
        got, want = drawn.run(forced), drawn.stock(torch.float64)
        for value, expected in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
            assert value.shape == expected.shape
            assert value.dtype == (problem.dtype if value.dim() > 1 else state_dtype(problem.dtype))
            if value.dim() > 1:
                assert value.stride() == drawn.x.stride(), "another memory format than that of x"
        return Orders(got, want, drawn.stock(problem.dtype))

    values = problem.x.numel()
    check_orders(values, problem.dtype, 16 + values // problem.shape[1], run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "clamp"), CASES, ids=str)
def test_values_and_derivatives(forced: Forced, activation: str, clamp: float, dtype: torch.dtype) -> None:
    last = (NAMES.index(activation) + DTYPES.index(dtype)) % 2 == 0
    check(Problem((3, 5, 5, 7), activation, clamp, dtype, last), forced)


@pytest.mark.parametrize("activation", ["leaky_relu", "prelu", "tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(forced: Forced, shape: tuple[int, ...], activation: str) -> None:
    check(Problem(shape, activation, CLAMP, torch.float64, last=False), forced)
    check(Problem(shape, activation, CLAMP, torch.float64, last=True), forced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("channels", [3, 40000])
def test_the_result_is_a_new_tensor(channels: int, backend: str, dtype: torch.dtype) -> None:
    """Also where there is nothing to do: writing to it leaves x as it was."""
    for wants_gradient in (False, True):
        x = torch.zeros(2, channels, dtype=dtype, requires_grad=wants_gradient)
        with fuseblock.backend(backend):
            y = functional.bias_act(x)
            assert not y._is_view()
            y.detach().add_(1)
            torch.func.jvp(lambda x: functional.bias_act(x).add_(1), (x.detach(),), (x.detach(),))
        assert not x.any()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [3, 16, 130])
def test_wide_tensors_take_several_runs_and_parts(channels: int, last: bool) -> None:
    """The CPU kernels sum in runs, periods and parts; threads share them."""
    forced = Forced("cpu")
    for activation in ("leaky_relu", "prelu"):
        check(Problem((2, channels, 41, 97), activation, CLAMP, torch.float32, last), forced)


def test_threads_do_not_change_sums() -> None:
    problem = Problem((4, 6, 90, 91), "leaky_relu", CLAMP, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(problem.run(Forced("cpu")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for order, first in zip(other, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(order, first, strict=True))


def test_float32_parameters_of_16_bit_images(forced: Forced) -> None:
    problem = Problem((2, 3, 4, 4), "prelu", CLAMP, torch.bfloat16)
    x, bias, slope = problem.x.bfloat16().requires_grad_(), problem.bias.float(), problem.slope.float()
    bias.requires_grad_(), slope.requires_grad_()
    leaves = [x.to(forced.device), bias.to(forced.device), slope.to(forced.device)]
    with fuseblock.backend(forced.name):
        y = functional.bias_act(leaves[0], leaves[1], slope=leaves[2], activation="prelu", gain=GAIN)
    y.backward(torch.ones_like(y))
    assert (y.dtype, bias.grad.dtype, slope.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    want = composite(x.double(), bias.double(), slope.double(), "prelu", 0.0, GAIN, math.inf)
    assert torch.equal(y.cpu(), want.bfloat16())


def operands(
    forced: Forced, activation: str, shape: tuple[int, ...] = (2, 3, 2, 2), last: bool = False
) -> list[Tensor]:
    problem = Problem(shape, activation, last=last)
    tensors = [t for t in (problem.x, problem.bias, problem.slope) if t is not None]
    return [t.to(forced.device).requires_grad_() for t in tensors]


def called(activation: str, clamp: float | None) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor, slope: Tensor | None = None) -> Tensor:
        return functional.bias_act(
            x, bias, activation=activation, negative_slope=SLOPE, slope=slope, gain=GAIN, clamp=clamp
        )

    return run


@pytest.mark.parametrize(
    ("activation", "clamp"), [("leaky_relu", 0.8), ("relu", None), ("prelu", None), ("silu", 0.8)]
)
def test_gradcheck_and_gradgradcheck(forced: Forced, activation: str, clamp: float | None) -> None:
    last = activation in ("relu", "prelu")
    inputs, run = operands(forced, activation, last=last), called(activation, clamp)
    fast = forced.name in ("triton", "cuda")  # interpreted and emulated kernels take milliseconds a call
    with fuseblock.backend(forced.name):
        # PyTorch's batched cotangents cannot be asked for their memory format.
        batched = not fast and not last
        assert torch.autograd.gradcheck(run, inputs, fast_mode=fast, check_batched_grad=batched)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=fast)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "prelu", "silu", "tanh", "elu"])
def test_third_order(activation: str) -> None:
    inputs, run = operands(Forced("cpu"), activation, (2, 2, 2)), called(activation, 0.8)

    def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
        y = run(*leaves)
        return torch.autograd.grad(y, leaves, (y + 1).cos(), create_graph=True)

    with fuseblock.backend("cpu"):
        assert torch.autograd.gradgradcheck(gradient, inputs, fast_mode=activation == "identity")


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_none_gradients_stay_none(activation: str) -> None:
    """A penalty on dx alone, and one on dbias alone."""
    inputs, run = operands(Forced("cpu"), activation), called(activation, None)
    want = called_composite(activation)
    for place in (0, 1):
        results = []
        for f in (run, want):
            with fuseblock.backend("cpu"):
                weight = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 2, 2).requires_grad_()
                grads = torch.autograd.grad((f(*inputs) * weight).sum(), inputs, create_graph=True)
                results.append(
                    torch.autograd.grad(grads[place].square().sum(), [weight, *inputs], allow_unused=True)
                )
        for got, expected in zip(*results, strict=True):
            if got is None:
                assert expected is None or not expected.any()
            else:
                torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


def called_composite(activation: str) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor, slope: Tensor | None = None) -> Tensor:
        return composite(x, bias, slope, activation, SLOPE, GAIN, math.inf)

    return run


LAYOUTS = {
    "permuted": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
    "no channels": lambda x: x[:, :0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_layouts(forced: Forced, layout: str, activation: str) -> None:
    problem = Problem((2, 3, 4, 5), activation)
    x = LAYOUTS[layout](problem.x)
    problem.x, problem.shape = x, tuple(x.shape)
    problem.dy, problem.v = (LAYOUTS["permuted"](LAYOUTS[layout](t)) for t in (problem.dy, problem.v))
    if layout == "no channels":
        problem.bias, problem.v_bias = problem.bias[:0], problem.v_bias[:0]
        if problem.slope is not None:
            problem.slope, problem.v_slope = problem.slope[:0], problem.v_slope[:0]
    want, got = problem.stock(torch.float64), problem.run(forced)
    assert got[0][0].is_contiguous()
    for order, expected in zip(got, want, strict=True):
        expected = [t for t in expected if t.numel()] if order and order[0].dim() == 1 else expected
        for a, b in zip(order, [t for t in expected if t.numel()], strict=False):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_sums_of_an_empty_batch_are_zero(forced: Forced) -> None:
    problem = Problem((2, 3, 4, 5), "prelu")
    x = problem.x[:0]
    _, dbias, dslope = forced.bias_act_bwd(
        x, x, problem.bias, problem.slope, None, *problem.constants, False, True
    )
    assert torch.equal(dbias, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(dslope, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("clamp", [math.inf, CLAMP])
def test_non_finite_values_travel_as_in_pytorch(forced: Forced, activation: str, clamp: float) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 100.0, -100.0, 0.5])
    problem = Problem((1, 1, 8, 1), activation, clamp)
    problem.x, problem.bias = special.double().view(1, 1, 8, 1), torch.zeros(1, dtype=torch.float64)
    got, want = problem.run(forced), problem.stock(torch.float64)
    torch.testing.assert_close(got[0][0], want[0][0], equal_nan=True, rtol=1e-12, atol=1e-12)
    dx, expected = got[1][0].flatten(), want[1][0].flatten()
    finite = torch.isfinite(special) if activation in KEEP_X else slice(None)
    torch.testing.assert_close(dx[finite], expected[finite], equal_nan=True, rtol=1e-12, atol=1e-12)


def test_dead_gradients_are_zeros_not_products(forced: Forced) -> None:
    x, dy = torch.tensor([[-1.0, 2.0, 9.0]]).T, torch.full((3, 1), math.inf)
    _, mask = forced.bias_act(x, None, None, "relu", 0.0, 1.0, 5.0, True)
    dx = forced.bias_act_bwd(dy, None, None, None, mask, "relu", 0.0, 1.0, 5.0, False, False)[0]
    assert dx.flatten().tolist() == [0.0, math.inf, 0.0]


def saved_bytes(run: Callable[[], Tensor]) -> int:
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes)


@pytest.mark.parametrize(
    ("activation", "clamp", "bits"),
    [("identity", None, 0), ("relu", 1.0, 1), ("leaky_relu", None, 1), ("leaky_relu", 1.0, 2)],
)
def test_saved_memory(activation: str, clamp: float | None, bits: int) -> None:
    x, bias = torch.randn(2, 8, 64, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    assert saved_bytes(lambda: called(activation, clamp)(x, bias)) == bits * x.numel() // 8


def test_without_save_there_is_no_mask_and_backward_says_so(forced: Forced) -> None:
    x = torch.randn(2, 3, 4)
    y, mask = forced.bias_act(x, None, None, "relu", 0.0, 1.0, math.inf, False)
    assert mask.numel() == 0
    torch.testing.assert_close(y, F.relu(x))
    with pytest.raises(ValueError, match="save=False"):
        forced.bias_act_bwd(y, None, None, None, mask, "relu", 0.0, 1.0, math.inf, False, False)


def test_functional_arguments() -> None:
    x, bias = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(functional.bias_act(x, bias, dim=-1, activation="tanh"), torch.tanh(x + bias))
    assert functional.bias_act(x, bias, dim=2).stride() == x.stride()
    slope = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    y = functional.bias_act(x, activation="prelu", slope=slope)
    torch.testing.assert_close(y, F.prelu(x, slope))
    y.sum().backward()
    torch.testing.assert_close(slope.grad, x.clamp(max=0).sum().view(1))
    large = torch.randn(2, 3, 200, 200, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    y = functional.bias_act(large, bias, activation="leaky_relu", negative_slope=SLOPE, gain=GAIN)
    torch.testing.assert_close(y, composite(large, bias, None, "leaky_relu", SLOPE, GAIN, math.inf))
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.bias_act(large.bfloat16(), bias, activation="relu").dtype == torch.bfloat16


@pytest.fixture
def _every_size() -> Iterator[None]:
    """Small tensors run on the operator, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional._bias_act, "FEW_ELEMENTS", 0)
        yield


@pytest.mark.usefixtures("_every_size")
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_transforms(activation: str) -> None:
    inputs, run = operands(Forced("cpu"), activation), called(activation, None)
    want = called_composite(activation)
    x, bias = (t.detach() for t in inputs)

    def results(f: Callable[..., Tensor]) -> list[Tensor]:
        def loss(x: Tensor, bias: Tensor) -> Tensor:
            return f(x, bias).square().sum()

        return [
            *torch.func.grad(loss, argnums=(0, 1))(x, bias),
            torch.func.hessian(loss, argnums=1)(x, bias),
            torch.func.vmap(lambda x: torch.func.grad(loss, argnums=1)(x[None], bias))(x),
            torch.func.jvp(f, (x, bias), (bias.view(1, -1, 1, 1) * x, bias))[1],
        ]

    for got, expected in zip(results(run), results(want), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_compile(activation: str) -> None:
    def step(x: Tensor, bias: Tensor) -> Tensor:
        return called(activation, 0.8)(x * 2, bias) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 3, 4, 4), channels_last(torch.randn(3, 3, 4, 6))):
        leaves = [x.requires_grad_(), torch.randn(3, requires_grad=True)]
        got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(step(*leaves).square().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("activation", "last"), [("leaky_relu", True), ("relu", False), ("prelu", True), ("silu", False)]
)
def test_opcheck(activation: str, last: bool, dtype: torch.dtype) -> None:
    p = Problem((2, 3, 4, 4), activation, CLAMP, dtype, last)
    x, bias, slope = (None if t is None else p.cast(t).requires_grad_() for t in (p.x, p.bias, p.slope))
    torch.library.opcheck(torch.ops.fuseblock.bias_act.default, (x, bias, slope, *p.constants, True))
    mask = ops.bias_act(x, bias, slope, *p.constants, True)[1]
    saved = (x, bias, slope) if p.keeps_x else (None, None, None)
    dy = p.cast(p.dy).requires_grad_()
    torch.library.opcheck(
        torch.ops.fuseblock.bias_act_bwd.default, (dy, *saved, mask, *p.constants, p.last, True)
    )
    saved = tuple(None if t is None else t.detach() for t in (dy, *saved)) if p.keeps_x else (None,) * 4
    cotangents = (p.cast(p.v), p.cast(p.v_bias), p.cast(p.v_slope))
    torch.library.opcheck(
        torch.ops.fuseblock.bias_act_bwd_bwd.default, (*cotangents, *saved, mask, *p.constants, p.last)
    )


def test_bad_input() -> None:
    x = torch.randn(2, 3, 4, 4)
    for arguments, error, message in [
        ({"x": torch.randn(3)}, ValueError, r"expected x of shape \(N, C, \.\.\.\)"),
        ({"x": x.long()}, TypeError, "floating point x"),
        ({"bias": torch.zeros(4)}, ValueError, r"expected bias of shape \(3,\), got \(4,\)"),
        (
            {"bias": torch.zeros(3).double()},
            TypeError,
            "expected bias of dtype torch.float32, got torch.float64",
        ),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "x and bias on one device"),
        ({"activation": "gelu"}, ValueError, "expected an activation among"),
        ({"activation": "prelu"}, ValueError, "slope belongs to activation 'prelu'"),
        ({"activation": "prelu", "slope": torch.zeros(2)}, ValueError, "expected slope of shape"),
        ({"gain": math.inf}, ValueError, "finite gain"),
        ({"clamp": -1.0}, ValueError, "clamp >= 0"),
        ({"clamp": math.nan}, ValueError, "clamp >= 0"),
        ({"dim": 4}, IndexError, "Dimension out of range"),
    ]:
        with pytest.raises(error, match=message):
            functional.bias_act(**({"x": x} | arguments))
