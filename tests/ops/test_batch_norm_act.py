"""Operator batch_norm_act on every backend: values, derivatives, layouts, running statistics, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import functional, ops
from fuseblock._activations import NAMES

from ..backends import Forced
from .batch_norm_act_cases import (
    DTYPES,
    EPS,
    SLOPE,
    Case,
    check,
    derivatives,
    is_curved,
    last,
    options,
    present,
    problem,
)
from .bounds import Orders, poisoned_outputs

CASES = [
    Case((3, 5, 5, 7), "relu", residual=True),
    Case((1, 3, 33, 31), "leaky_relu", channels_last=True),
    Case((3, 96, 1, 1), "silu", residual=True),
    Case((3, 1, 5, 7), "prelu", residual=True),
    Case((2, 96, 5, 7), "tanh", channels_last=True, training=False),
    Case((3, 3, 8, 8), "elu", residual=True, channels_last=True),
    Case((6, 5), "identity", affine=False),
    Case((2, 5, 4, 2, 3), "leaky_relu", residual=True, channels_last=True),
    Case((3, 3, 7), "prelu", channels_last=True),
    Case((3, 6, 4, 4), "silu", training=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives(forced: Forced, case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, lambda case: _all_orders(forced, case, dtype))


def _all_orders(forced: Forced, case: Case, dtype: torch.dtype) -> Orders:
    p = problem(case, dtype)
    x, weight, bias, residual, slope, mean, var = p.inputs
    assert x is not None
    with poisoned_outputs():
        y, *statistics, mask = forced.batch_norm_act(
            *p.inputs, EPS, case.activation, SLOPE, case.training, "", True
        )
        batch_mean, _, invstd, count = statistics
        masked = residual is not None and case.activation in ("relu", "leaky_relu")
        saved = weight, bias, None if masked else residual, slope, batch_mean, invstd, count
        saved = *saved, mask if masked else None
        first = forced.batch_norm_act_bwd(p.dy, x, *saved, *options(case), True, True, residual is not None)
        given = [
            t if leaf is not None else None
            for t, leaf in zip(p.v, (x, weight, bias, slope, residual), strict=True)
        ]
        second = forced.batch_norm_act_bwd_bwd(*given, p.dy, x, *saved, *options(case))
    assert mask.numel() == ((x.numel() + 7) // 8 if masked else 0)
    got = [[y], present(first), present(second if is_curved(case) else second[:3])]
    for g, w in zip(itertools.chain(*got), itertools.chain(*p.want), strict=True):
        assert g.shape == w.shape
        if g.shape == x.shape:
            assert g.dtype == dtype
            assert g.stride() == x.stride()
    return Orders(got, p.want, p.stock)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_statistics(forced: Forced, dtype: torch.dtype, channels_last: bool) -> None:
    """A mean of 1000 standard deviations costs the variance no more digits than it costs the mean."""
    case = Case((3, 5, 33, 31), "identity", channels_last=channels_last)
    x = case.full(0, dtype, shift=1000)
    _, mean, var, invstd, count, _ = forced.batch_norm_act(
        x, None, None, None, None, None, None, EPS, "identity", 0.0, True, "", False
    )
    dims = (0, 2, 3)
    for got, want in zip(
        (mean, var), (x.double().mean(dims), x.double().var(dims, correction=0)), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=2000 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(invstd, (var + EPS).rsqrt())
    assert count.shape == ()
    assert count == 3 * 33 * 31


@pytest.mark.parametrize("activation", NAMES)
def test_gradcheck_and_gradgradcheck(forced: Forced, activation: str) -> None:
    """In both layouts; the slow ones of the backends in one of them, and without what Python does on all backends."""
    slow = forced.name in ("triton", "cuda")
    options = {"fast_mode": slow, "check_undefined_grad": not slow}
    odd = NAMES.index(activation) % 2 == 1
    for channels_last in (odd,) if slow else (False, True):
        residual, training = activation not in ("identity", "tanh"), activation != "elu"
        case = Case((3, 2, 2, 2), activation, residual, channels_last, training)
        leaves = [
            None if t is None else t.to(forced.device).requires_grad_()
            for t in case.inputs(torch.float64)[:5]
        ]
        running = None, None
        if not training:
            running = torch.zeros(2).double().to(forced.device), torch.ones(2).double().to(forced.device)

        def run(*tensors: Any, running: Any = running, training: bool = training) -> Tensor:
            x, weight, bias, residual, slope = tensors
            keywords = {"running_mean": running[0], "running_var": running[1], "training": training}
            return functional.batch_norm_act(
                x,
                weight,
                bias,
                residual,
                slope=slope,
                activation=activation,
                negative_slope=SLOPE,
                **keywords,
            )

        with fuseblock.backend(forced.name):
            assert torch.autograd.gradcheck(run, leaves, **options)
            assert torch.autograd.gradgradcheck(run, leaves, **options)


LAYOUTS = {
    "permuted": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape[0], *x.shape[1:]),
    "other": last,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(forced: Forced, layout: str) -> None:
    """Tensors of any layout, and those of one call in different ones."""
    case = Case((4, 3, 6, 5), "silu", residual=True)
    x, weight, bias, residual, *_ = case.inputs(torch.float64)
    dy = case.full(10, torch.float64)
    change = LAYOUTS[layout]
    for a, b, c in ((change(x), residual, dy), (x, change(residual), dy), (x, residual, change(dy))):
        want = derivatives(
            case, (a, weight, bias, b, None, None, None), c, [c, weight, bias, weight, c], torch.float64
        )
        y, mean, _, invstd, count, _ = forced.batch_norm_act(
            a, weight, bias, b, None, None, None, EPS, "silu", 0.0, True, "", True
        )
        saved = weight, bias, b, None, mean, invstd, count, None
        first = forced.batch_norm_act_bwd(c, a, *saved, *options(case), True, True, True)
        second = forced.batch_norm_act_bwd_bwd(c, weight, bias, None, c, c, a, *saved, *options(case))
        for got, expected in zip(
            (y, *present(first), *present(second)), [t for order in want for t in order], strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_missing_cotangents_mean_zeros(forced: Forced) -> None:
    case = Case((3, 2, 4, 4), "prelu", residual=True)
    x, weight, bias, residual, slope, *_ = case.inputs(torch.float64)
    dy = case.full(10, torch.float64)
    y, mean, _, invstd, count, _ = forced.batch_norm_act(
        x, weight, bias, residual, slope, None, None, EPS, "prelu", 0.0, True, "", True
    )
    saved = dy, x, weight, bias, residual, slope, mean, invstd, count, None
    v = [case.full(11, torch.float64), *(case.channels(n, torch.float64) for n in (12, 13, 14)), dy]
    for present_one in range(5):
        some = [t if n == present_one else None for n, t in enumerate(v)]
        zeros = [t if n == present_one else torch.zeros_like(t) for n, t in enumerate(v)]
        got = forced.batch_norm_act_bwd_bwd(*some, *saved, *options(case))
        want = forced.batch_norm_act_bwd_bwd(*zeros, *saved, *options(case))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_non_finite_input(forced: Forced) -> None:
    """One NaN or infinity makes its channel NaN, in training, and no other."""
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 3, 4, 4)
        x[1, 1, 2, 2] = value
        for layout in (x, last(x)):
            y, mean, _, invstd, count, _ = forced.batch_norm_act(
                layout, None, None, None, None, None, None, EPS, "leaky_relu", SLOPE, True, "", False
            )
            assert y[:, 1].isnan().all()
            assert y[:, [0, 2]].isfinite().all()
            saved = None, None, None, None, mean, invstd, count, None, "leaky_relu", SLOPE, True, "", EPS
            dx, *_ = forced.batch_norm_act_bwd(torch.ones_like(layout), layout, *saved, True, False, False)
            assert dx[:, 1].isnan().all()
            assert dx[:, [0, 2]].isfinite().all()


def test_run_to_run_equal(forced: Forced) -> None:
    case = Case((3, 5, 33, 31), "silu")
    args = *case.inputs(torch.float32), EPS, "silu", 0.0, True, "", False
    for a, b in zip(forced.batch_norm_act(*args), forced.batch_norm_act(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_opcheck(case: Case) -> None:
    x, weight, bias, residual, slope, mean, var = case.inputs(torch.float64)
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, residual, slope)]
    args = *leaves, mean, var, EPS, case.activation, SLOPE, case.training, "", True
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act.default, args)
    _, mean, _, invstd, count, mask = (t.detach() for t in ops.batch_norm_act(*args))
    masked = residual is not None and case.activation == "relu"
    saved = weight, bias, None if masked else residual, slope, mean, invstd, count, mask if masked else None
    dy = case.full(10, torch.float64).requires_grad_()
    args = dy, x, *saved, *options(case), True, True, residual is not None
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act_bwd.default, args)
    saved = tuple(None if t is None else t.detach() for t in saved)
    v = x.detach(), None if weight is None else weight.detach(), None, None, None
    args = *v, dy.detach(), x.detach(), *saved, *options(case)
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act_bwd_bwd.default, args)


def test_given_statistics_of_the_batch(forced: Forced) -> None:
    """Those that the producer of x summed: the results are those of statistics computed here."""
    case = Case((3, 5, 5, 7), "silu")
    x, weight, bias, *_ = case.inputs(torch.float64)
    own = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    rest = EPS, "silu", 0.0, True, "", False
    got = forced.batch_norm_act(x, weight, bias, None, None, *own, *rest)
    want = forced.batch_norm_act(x, weight, bias, None, None, None, None, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_running_statistics(backend: str, dtype: torch.dtype) -> None:
    x = Case((3, 5, 4, 4), "identity").full(0, dtype, shift=2)
    ours, stock = ([torch.zeros(5), torch.ones(5)] for _ in range(2))
    with fuseblock.backend(backend):
        before = ours[0]._version
        for grad in (False, True):
            functional.batch_norm_act(
                x.detach().requires_grad_(grad), running_mean=ours[0], running_var=ours[1], momentum=0.3
            )
            F.batch_norm(x.float(), *stock, training=True, momentum=0.3)
        torch.testing.assert_close(ours, stock)
        assert ours[0]._version > before
        now = [t.clone() for t in ours]
        y = functional.batch_norm_act(x, running_mean=ours[0], running_var=ours[1], training=False)
        torch.testing.assert_close(y.float(), F.batch_norm(x.float(), *stock), rtol=1e-2, atol=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(ours, now, strict=True))
        functional.batch_norm_act(x[:0], running_mean=ours[0], running_var=ours[1])
        assert all(torch.equal(a, b) for a, b in zip(ours, now, strict=True))


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "silu"])
def test_one_node_equals_the_operators(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain eager calls leave the operators out: results and gradients of both orders are the same."""
    from fuseblock import _batch_norm_node

    case = Case((3, 5, 4, 4), activation, residual=True)
    inputs = case.inputs(torch.float64)[:4]
    v, dy = case.full(11, torch.float64), case.full(10, torch.float64)

    def run() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        running = torch.zeros(5).double(), torch.ones(5).double()
        y = functional.batch_norm_act(
            *leaves, running_mean=running[0], running_var=running[1], activation=activation
        )
        grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        recorded = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad((recorded[0] * v).sum() + recorded[1].sum(), leaves, allow_unused=True)
        with torch.no_grad():
            silent = functional.batch_norm_act(*inputs, activation=activation)
        return [y, silent, *grads, *recorded, *(t for t in second if t is not None), *running]

    direct = run()
    monkeypatch.setattr(_batch_norm_node, "can_run", lambda *args: False)
    for a, b in zip(direct, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_that_nobody_asked_for() -> None:
    case = Case((3, 5, 4, 4), "leaky_relu", residual=True)
    x, weight, bias, residual, *_ = case.inputs(torch.float32)
    for wanted in range(4):
        leaves = [t.detach().requires_grad_(n == wanted) for n, t in enumerate((x, weight, bias, residual))]
        functional.batch_norm_act(*leaves, activation="leaky_relu").square().sum().backward()
        assert [t.grad is not None for t in leaves] == [n == wanted for n in range(4)]


def test_two_forwards_and_one_backward() -> None:
    """D(real) and D(fake): running statistics move in between, which backward must not see."""
    case = Case((3, 5, 4, 4), "leaky_relu")
    x, weight, bias, *_ = case.inputs(torch.float64)
    weight.requires_grad_()
    running = torch.zeros(5).double(), torch.ones(5).double()

    def loss(data: Tensor) -> Tensor:
        y = functional.batch_norm_act(
            data, weight, bias, running_mean=running[0], running_var=running[1], activation="leaky_relu"
        )
        return y.pow(3).sum()

    (loss(x) + loss(2 * x + 1)).backward()
    apart = torch.autograd.grad(loss(x), weight)[0] + torch.autograd.grad(loss(2 * x + 1), weight)[0]
    torch.testing.assert_close(weight.grad, apart)


def test_third_order() -> None:
    x = Case((3, 2, 2, 2), "silu").full(0, torch.float64).requires_grad_()

    def third() -> Tensor:
        y = functional.batch_norm_act(x, activation="silu")
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        (grad2,) = torch.autograd.grad(grad.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad2.pow(2).sum(), x)[0]

    with pytest.raises(NotImplementedError, match="third derivatives need fuseblock.backend"):
        third()
    with fuseblock.backend("reference"):
        got = third()

    def plain(x: Tensor) -> Tensor:
        # Not F.batch_norm: its second derivative takes the saved statistics for constants, so that its third is wrong.
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return F.silu((x - mean) / (var + 1e-5).sqrt())

    (grad,) = torch.autograd.grad(plain(x).pow(2).sum(), x, create_graph=True)
    (grad2,) = torch.autograd.grad(grad.pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(grad2.pow(2).sum(), x)[0])


def test_transforms_and_forward_mode() -> None:
    case = Case((3, 2, 2, 2), "silu")
    x = case.full(0, torch.float64)
    batch = torch.stack([x, 2 * x + 1])

    def loss(x: Tensor) -> Tensor:
        return functional.batch_norm_act(x, activation="silu").pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss))(batch)
    want = torch.stack(
        [torch.autograd.grad(loss(t), t)[0] for t in map(Tensor.requires_grad_, batch.unbind())]
    )
    torch.testing.assert_close(got, want)
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.grad(loss)(x).sum(), atol=1e-12, rtol=1e-9)


def test_autocast_promotes_the_residual() -> None:
    x, residual = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.batch_norm_act(x, residual=residual)
    assert y.dtype == torch.float32


def test_bad_input() -> None:
    x, five = torch.randn(2, 3, 4, 4), torch.ones(5)
    run = functional.batch_norm_act
    with pytest.raises(ValueError, match=r"weight of shape \(3,\), got \(5,\): x of .* has 3 channels"):
        run(x, five)
    with pytest.raises(ValueError, match=r"expected bias of shape \(3,\), got \(5,\)"):
        run(x, None, five)
    for training in (False, True):
        with pytest.raises(ValueError, match=r"running_mean of shape \(3,\), got \(5,\): .* 3 channels"):
            run(x, running_mean=five, running_var=five, training=training)
        with pytest.raises(TypeError, match=r"expected floating point running_mean, got torch.int32"):
            run(x, running_mean=torch.zeros(3, dtype=torch.int), running_var=torch.ones(3), training=training)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, ...\)"):
        run(x[0, 0, 0], running_mean=five, running_var=five)
    with pytest.raises(ValueError, match="expected residual of the shape of x"):
        run(x, residual=x[:1])
    with pytest.raises(TypeError, match="expected residual of the dtype of x"):
        run(x, residual=x.double())
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        run(x[:1, :, :1, :1])
    with pytest.raises(TypeError, match="expected floating point x"):
        run(x.long())
    with pytest.raises(TypeError, match="expected floating point weight"):
        run(x, torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, ...\)"):
        run(x[0, 0, 0])
    with pytest.raises(ValueError, match="expected an activation among"):
        run(x, activation="gelu")
    with pytest.raises(ValueError, match="slope belongs to activation 'prelu'"):
        run(x, activation="prelu")
    with pytest.raises(ValueError, match=r"expected slope of shape \(1,\) or \(3,\)"):
        run(x, activation="prelu", slope=five)
    with pytest.raises(ValueError, match="expected running_mean and running_var together"):
        run(x, running_mean=torch.zeros(3))
    with pytest.raises(ValueError, match="where training is False"):
        run(x, training=False)
    with pytest.raises(ValueError, match=r"expected weight on cpu, as x, got meta"):
        run(x, torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"expected residual on cpu, as x, got meta"):
        run(x, residual=x.to("meta"))
    ones = torch.ones(3)
    for error, message, statistics in (
        (TypeError, "statistics as two tensors, mean and variance, got Tensor$", torch.stack([ones, ones])),
        (TypeError, "statistics as two tensors, mean and variance, got Tensor, NoneType", (ones, None)),
        (ValueError, r"variance of statistics of shape \(3,\), got \(5,\)", (ones, five)),
        (TypeError, "floating point mean of statistics", (ones.long(), ones)),
    ):
        with pytest.raises(error, match=message):
            run(x, statistics=statistics)


def test_a_mask_must_have_been_saved() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    args = x, None, None, x, None, None, None, EPS, "relu", 0.0, True, ""
    with pytest.raises(ValueError, match="expected save=True where a gradient is wanted"):
        ops.batch_norm_act(*args, False)
