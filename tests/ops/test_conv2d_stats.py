"""Operator conv2d_stats on its backends: values, statistics, derivatives of every order, layouts, transforms, errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuseblock
from fuseblock import dispatch, functional

from ..backends import _ON_GPU, Forced, available
from . import conv_stats_cases as cases
from .conv_stats_cases import DTYPES, LAYOUTS, NO_PROLOGUE, call

# x, weight, stride, padding
CASES = {
    "3x3": ((2, 5, 7, 6), (9, 5, 3, 3), 1, 1),
    "4x4, stride 2": ((3, 20, 6, 8), (3, 20, 4, 4), 2, 1),
    "uneven": ((1, 1, 5, 9), (1, 1, 3, 2), (2, 1), (0, 2)),
    "one value": ((1, 3, 1, 1), (5, 3, 3, 3), 1, 1),
}


@pytest.fixture(params=["reference", pytest.param("triton", marks=_ON_GPU)])
def forced(request: pytest.FixtureRequest) -> Iterator[Forced]:
    with available(request.param) as operators:
        yield operators


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs in every direction, and several steps over channels."""
    launch = pytest.importorskip("fuseblock.launch.triton_conv_stats")
    monkeypatch.setattr(launch, "_blocks", lambda *args: launch.Blocks(16, 16, 16, 1))
    monkeypatch.setattr(launch, "COMBINE_BLOCKS", (4, 16))


def inputs(case: str, dtype: torch.dtype, layout: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    shape, weight, _, _ = CASES[case]
    x, w, b = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, weight, weight[:1]))
    return x.contiguous(memory_format=LAYOUTS[layout]), w, b


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values(forced: Forced, case: str, layout: str) -> None:
    for dtype in DTYPES:
        x, w, b = inputs(case, dtype, layout)
        cases.check_values(forced, functional.conv2d_stats, F.conv2d, x, w, b, *CASES[case][2:])
    w = w.contiguous(memory_format=LAYOUTS[layout])
    cases.check_values(forced, functional.conv2d_stats, F.conv2d, x, w, None, *CASES[case][2:])


@pytest.mark.usefixtures("small_blocks")
def test_many_blocks() -> None:
    with available("triton") as triton:
        x, w, b = torch.randn(2, 20, 5, 5), torch.randn(19, 20, 3, 3), torch.randn(19)
        cases.check_values(triton, functional.conv2d_stats, F.conv2d, x, w, b, 1, 1)
        first, second = (call(triton, functional.conv2d_stats, x, w, b, 1, 1) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_variance_beside_a_large_mean(forced: Forced) -> None:
    x, w = torch.randn(2, 4, 6, 6), 0.1 * torch.randn(5, 4, 3, 3)
    b = torch.full((5,), 1000.0)
    y, _, var = call(forced, functional.conv2d_stats, x, w, b, 1, 1)
    want = y.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), want, rtol=1e-4, atol=0)


def test_gradients_of_every_order(forced: Forced) -> None:
    x, w, b = torch.randn(2, 2, 4, 3), torch.randn(3, 2, 3, 3), torch.randn(3)
    x = x.contiguous(memory_format=torch.channels_last)
    cases.check_gradients(
        forced, lambda *t: functional.conv2d_stats(*t, (2, 1), 1), lambda *t: F.conv2d(*t, (2, 1), 1), x, w, b
    )


def test_a_norm_before_it(forced: Forced) -> None:
    x, w, b = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 3, 3), torch.randn(2)
    options = {"stride": (2, 1), "padding": 1}
    ours, stock = partial(functional.conv2d_stats, **options), partial(F.conv2d, **options)
    cases.check_prologue(forced, ours, stock, x.contiguous(memory_format=torch.channels_last), w, b)


def test_behind_it_a_batch_norm(forced: Forced) -> None:
    x, w, _ = inputs("3x3", torch.float64)
    cases.check_batch_norm(
        forced, lambda *t: functional.conv2d_stats(*t, None, 1, 1), lambda *t: F.conv2d(*t, None, 1, 1), x, w
    )


def test_a_batch_norm_takes_its_statistics() -> None:
    x, w, _ = (t.requires_grad_() for t in inputs("3x3", torch.float64))
    y, mean, var = functional.conv2d_stats(x, w, None, 1, 1)
    running = [torch.zeros(9, dtype=y.dtype), torch.ones(9, dtype=y.dtype)]
    z = functional.batch_norm_act(
        y, running_mean=running[0], running_var=running[1], activation="relu", statistics=(mean, var)
    )
    stock = torch.nn.BatchNorm2d(9, affine=False, dtype=y.dtype)
    want = stock(F.conv2d(x, w, None, 1, 1)).relu()
    torch.testing.assert_close(z, want)
    torch.testing.assert_close(running, [stock.running_mean, stock.running_var])
    for got, expected in zip(*(torch.autograd.grad(t.pow(3).sum(), [x, w]) for t in (z, want)), strict=True):
        assert cases.relative_error(got, expected) < 1e-9
    with pytest.raises(ValueError, match="training without process_group where statistics are given"):
        functional.batch_norm_act(
            y, running_mean=mean, running_var=var, training=False, statistics=(mean, var)
        )


def test_only_the_gradients_asked_for() -> None:
    x, w, _ = inputs("3x3", torch.float64)
    cases.check_masks(lambda *t: functional.conv2d_stats(*t), x, w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    x, w, b = (t.requires_grad_() for t in inputs("3x3", torch.float64, layout))
    for bias in (b, None):
        torch.library.opcheck(
            torch.ops.fuseblock.conv2d_stats.default, (x, w, bias, 2, 1, 1, 0, *NO_PROLOGUE)
        )


def test_transforms_and_autocast() -> None:
    x, w, b = inputs("3x3", torch.float64)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return sum(o.square().sum() for o in functional.conv2d_stats(x[None], w, b, 1, 1))

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    leaf = w.requires_grad_()
    for n in range(2):
        outputs = cases.with_stats(F.conv2d(x[n : n + 1], leaf, b, 1, 1))
        (want,) = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaf)
        torch.testing.assert_close(per_sample[n], want)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = functional.conv2d_stats(x.float(), w.float(), b.float())
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)


def test_it_runs_on_pytorch_where_there_is_no_gpu() -> None:
    args = (torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), None, 1, 1, 0, 0, *NO_PROLOGUE)
    assert dispatch.choose("conv2d_stats", args).name == "reference"
    with available("triton"), fuseblock.backend("triton"):
        large = (args[0], torch.randn(3, 2, 6, 6), *args[2:])
        with pytest.raises(fuseblock.BackendError, match="more than 25 taps|tensors are on cpu"):
            dispatch.choose("conv2d_stats", large)


def test_tall_tiles_are_for_many_channels_in_16_bit() -> None:
    launch = pytest.importorskip("fuseblock.launch.triton_conv_stats")
    usual, tall = (launch.gpu_blocks(torch.bfloat16, "ieee", 1, 64, 64, is_tall=t) for t in (False, True))
    assert (tall.m, tall.n, tall.k) == (2 * usual.m, usual.n, usual.k)
    x, w = torch.empty(1, 64, 2, 2, dtype=torch.float16), torch.empty(64, 64, 3, 3, dtype=torch.float16)
    last = x.contiguous(memory_format=torch.channels_last)
    assert "16-bit channels-last" in launch.why_not_tall(x, w)
    assert "16-bit channels-last" in launch.why_not_tall(last.float(), w)
    assert "fewer than 64 channels" in launch.why_not_tall(last, w[:32])
    with available("triton"), fuseblock.backend("triton"):
        assert launch.why_not_tall(last, w) is None


def test_bad_input() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    for error, message, args in (
        (ValueError, r"x of shape \(N, 2, H, W\)", (x[:, :1], w)),
        (ValueError, "expected weight of shape", (x, w[0])),
        (ValueError, r"bias of shape \(3,\)", (x, w, torch.ones(2))),
        (TypeError, "weight of dtype torch.float32", (x, w.double())),
        (TypeError, "floating point", (x.long(), w.long())),
        (ValueError, "no values", (x[..., :1], w)),
        (ValueError, "no values", (x[:0], w)),
        (ValueError, "stride of at least 1", (x, w, None, 0)),
        (ValueError, "padding as one number or two", (x, w, None, 1, (1, 2, 3))),
        (ValueError, "weight on cpu", (x, w.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            functional.conv2d_stats(*args)
    two = torch.ones(2)
    for error, message, options in (
        (ValueError, "scale and shift together", {"scale": two}),
        (ValueError, r"shift of shape \(2,\)", {"scale": two, "shift": torch.ones(3)}),
        (ValueError, "scale on cpu", {"scale": two.to("meta"), "shift": two}),
        (TypeError, "scale of a floating point dtype", {"scale": two.long(), "shift": two}),
        (ValueError, "an activation among", {"scale": two, "shift": two, "activation": "prelu"}),
        (ValueError, "scale and shift where there is an activation", {"activation": "relu"}),
    ):
        with pytest.raises(error, match=message):
            functional.conv2d_stats(x, w, **options)
