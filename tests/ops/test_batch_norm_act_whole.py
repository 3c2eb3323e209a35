"""Forward and backward of the CUDA kernels as wholes: one launch where channels fit into shared memory, else several.

The emulator runs them on devices whose limits are set; on a GPU they run on that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseblock.launch.batch_norm_act import Site

from ..backends import DEVICE
from .batch_norm_act_formulas import NEGATIVE_SLOPE, Case, Formulas, compare, packed
from .bounds import poisoned_outputs, state_dtype
from .test_batch_norm_act_kernels import cuda_kernels

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 1e-3
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def norm() -> Iterator[Any]:
    """The emulator, as an H200 again afterwards."""
    if DEVICE == "cuda":
        pytest.skip("the device is the emulator's")
    from ..emulator import load_norm

    emulated = load_norm()
    yield emulated
    emulated.set_device()
    emulated.set_seed(0)


def site_of(case: Case, per_sample: bool) -> tuple[Site, Site, Tensor | None]:
    """What the kernels get but for the statistics, the same for the formulas with exact ones, and the bits of the mask."""
    site, bits = case.site()
    shape = case.shape
    if per_sample:
        rows = replace(case, shape=(1, shape[0] * shape[1], *shape[2:]), channels_last=False)
        folded, _ = rows.site()
        site = replace(folded, x=site.x, per_sample=True)
        exact = replace(folded, x=site.x.reshape(rows.shape))
    else:
        exact = site
    axes = [d for d in range(exact.x.dim()) if d != 1]
    var, mean = torch.var_mean(exact.x.double(), axes, correction=0)
    exact = replace(exact, mean=mean, invstd=(var + EPS).rsqrt())
    state = state_dtype(case.dtype)
    return replace(site, mean=exact.mean.to(state), invstd=exact.invstd.to(state)), exact, bits


def gradients(dy: Tensor, f: Formulas) -> tuple[Tensor, ...]:
    """(dx, dresidual) through the statistics."""
    dy = dy.to(f.dtype)
    s1, s2, *_ = f.bwd_reduce(dy)
    count = f.x.numel() // f.x.shape[1]
    scale = f.scale * f.per_channel(f.weight, 1).flatten()
    f.magnitudes = None
    return f.bwd_apply(dy, torch.stack([scale, -scale * s1 / count, -scale * s2 / count]))


def check(kernels: Any, case: Case, per_sample: bool = False) -> list[Tensor]:
    """Hold both wholes to the formulas; their results."""
    site, exact, bits = site_of(case, per_sample)
    site = Site(**{n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in vars(site).items()})
    masked = case.saved == "residual" and case.activation in ("relu", "leaky_relu")
    longest = exact.x.numel() // exact.x.shape[1] + 32
    results = []

    def folded(t: Tensor) -> Tensor:
        assert t.stride() == site.x.stride()
        return t.cpu().reshape(exact.x.shape)

    if case.saved != "mask":
        affine = site.weight, site.bias, site.residual, site.slope
        with poisoned_outputs():
            y, mean, var, invstd, mask = kernels.whole_fwd(
                site.x, *affine, EPS, site.activation, NEGATIVE_SLOPE, per_sample, masked
            )
        results += [y, mean, var, invstd, mask]
        compare("y", [folded(y)], exact, bits, lambda f: [f.y], longest)
        got = [mean.cpu(), (var * (longest - 32)).cpu()]
        compare("mean m2", got, exact, bits, lambda f: f.stats(), longest)
        torch.testing.assert_close(invstd, (var + EPS).rsqrt(), rtol=8 * torch.finfo(var.dtype).eps, atol=0)
        if masked:
            z = Formulas(exact, bits, FLOAT64).z
            sure = packed(case.flat(z.abs() > 1e-4))
            assert torch.equal(mask.cpu() & sure, packed(case.flat(z > 0)) & sure)
    dy = case.elements(3)
    if masked:
        exact = replace(exact, residual=None, mask=packed(case.flat(Formulas(exact, None, FLOAT64).z > 0)))
        site = replace(site, residual=None, mask=exact.mask.to(DEVICE))
        bits = Formulas(replace(exact, residual=case.elements(2)), None, FLOAT64).z > 0
    dy_folded = dy.reshape(exact.x.shape)
    with poisoned_outputs():
        dx, dresidual, sums = kernels.whole_bwd(dy.to(DEVICE), site, not per_sample)
    results += [dx, dresidual, sums]

    def wanted(f: Formulas) -> tuple[Tensor, ...]:
        f.scale, f.weight = (
            exact.invstd.to(f.dtype),
            None if exact.weight is None else exact.weight.to(f.dtype),
        )
        return gradients(dy_folded, f)[: 1 if per_sample else 2]

    got = [folded(dx)] if per_sample else [folded(dx), folded(dresidual)]
    compare("dx dr"[: 3 * len(got)], got, exact, bits, wanted, longest)
    compare(
        "s1 s2 s3"[: 3 * len(sums)],
        sums.cpu(),
        exact,
        bits,
        lambda f: f.bwd_reduce(dy_folded.to(f.dtype)),
        longest,
    )
    return results


def launch_shape(norm: Any) -> tuple[int, ...]:
    return tuple(norm.last_launch())


#: (case, statistics per sample, grid and block of backward): clusters of one to eight blocks, chunks of some channels.
RESIDENT = [
    (Case((4, 2, 16, 32), False, "silu", BFLOAT16, saved="residual"), False, (16, 1, 1, 32)),
    (Case((3, 3, 8, 40), False, "leaky_relu", FLOAT32, saved="residual"), False, (24, 1, 1, 32)),
    (Case((3, 5, 4, 8), False, "prelu", FLOAT16), False, (5, 1, 1, 32)),
    (Case((4, 24, 8, 8), True, "leaky_relu", BFLOAT16, saved="residual"), False, (8, 1, 3, 32)),
    (Case((2, 96, 1, 33), True, "relu", FLOAT32), False, (8, 1, 12, 21)),
    (Case((2, 264, 3), True, "tanh", FLOAT16, affine=False), False, (9, 1, 4, 32)),
    (Case((3, 16, 9, 31), True, "elu", BFLOAT16), True, (6, 1, 2, 128)),
    (Case((2, 8, 1, 5), True, "prelu", FLOAT32, one_slope=True), True, (2, 1, 2, 32)),
    (Case((2, 3, 16, 16), False, "silu", FLOAT32), True, (12, 1, 1, 32)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "per_sample", "shape"), RESIDENT, ids=str)
def test_channels_in_shared_memory(norm: Any, case: Case, per_sample: bool, shape: tuple[int, ...]) -> None:
    check(norm.kernels, case, per_sample)
    assert launch_shape(norm) == shape


#: Rows that are no whole vectors, float64, one value of many channels: launches of a pass each.
SEVERAL = [
    (Case((3, 5, 33, 31), False, "leaky_relu", BFLOAT16, saved="residual"), False),
    (Case((3, 100, 5, 7), True, "leaky_relu", BFLOAT16, saved="residual"), False),
    (Case((3, 16, 4), True, "silu", FLOAT64, saved="residual"), False),
    (Case((2, 16, 16), False, "relu", FLOAT32, saved="residual", offset=1), False),
    (Case((3, 5, 7, 9), True, "prelu", FLOAT32), True),
]


@pytest.mark.parametrize(("case", "per_sample"), SEVERAL, ids=str)
def test_several_launches(case: Case, per_sample: bool) -> None:
    check(cuda_kernels(), case, per_sample)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "per_sample", "shape"), RESIDENT, ids=str)
def test_on_a_gpu(case: Case, per_sample: bool, shape: tuple[int, ...]) -> None:
    check(cuda_kernels(), case, per_sample)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_limits_of_the_device(norm: Any, last: bool) -> None:
    """Results agree whatever fits: clusters or not, half of the shared memory, all of it, or nothing."""
    case = Case((4, 16, 16, 16), last, "silu", FLOAT32)
    on_h200 = check(norm.kernels, case)
    cluster = launch_shape(norm)
    norm.set_device(clusters=False)
    alone = check(norm.kernels, case)
    assert launch_shape(norm)[0] < cluster[0]
    norm.set_device(clusters=False, shared_bytes=24 << 10)
    several = check(norm.kernels, case)
    assert launch_shape(norm)[0] < cluster[0]
    for other in (alone, several):
        for a, b in zip(on_h200, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_without_room_for_clusters(norm: Any, last: bool) -> None:
    """A device that has clusters, and a driver that starts none: several launches instead, and no error is left."""
    case = Case((4, 16, 16, 16), last, "silu", FLOAT32)
    norm.set_device(clusters=False, shared_bytes=(24 if last else 5) << 10)
    several = check(norm.kernels, case)
    norm.set_device(largest_cluster=1)
    refused = check(norm.kernels, case)
    assert all(torch.equal(a, b) for a, b in zip(refused, several, strict=True))


@pytest.mark.parametrize("case", [RESIDENT[0][0], RESIDENT[3][0]], ids=str)
def test_results_repeat_whatever_the_order_of_threads(norm: Any, case: Case) -> None:
    want = check(norm.kernels, case)
    for seed in range(1, 5):
        norm.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(check(norm.kernels, case), want, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(bad: float, last: bool) -> None:
    case = Case((2, 8, 4, 8), last, "leaky_relu", FLOAT32)
    site, _ = case.site()
    site.x[1, 1, 2, 3] = bad
    kernels, (x, weight, bias) = cuda_kernels(), (t.to(DEVICE) for t in (site.x, site.weight, site.bias))
    y, *statistics, _ = kernels.whole_fwd(
        x, weight, bias, None, None, EPS, site.activation, 0.1, False, False
    )
    mean, _, invstd = statistics
    on_device = replace(site, x=x, weight=weight, bias=bias, mean=mean, invstd=invstd)
    dx, _, sums = kernels.whole_bwd(case.elements(3).to(DEVICE), on_device, False)
    others = [c for c in range(8) if c != 1]
    for result in (y.transpose(0, 1), dx.transpose(0, 1)):
        assert result[others].isfinite().all()
        assert not result[1].isfinite().any()
    for result in (*statistics, *sums):
        assert result[others].isfinite().all()


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_statistics_far_from_zero(last: bool) -> None:
    x = Case((3, 8, 40), last, "identity", FLOAT32).elements(0)
    x[:, 1] += 1e4
    x[0, 2, 0] = 1e4
    none = (None,) * 4
    _, mean, var, *_ = cuda_kernels().whole_fwd(x.to(DEVICE), *none, EPS, 0, 0.0, False, False)
    eps, want = torch.finfo(FLOAT32).eps, x.double()
    torch.testing.assert_close(mean.cpu().double(), want.mean((0, 2)), rtol=4 * eps, atol=4 * eps)
    slack = torch.ones(8).double() * 64 * eps
    slack[1] *= 1e4  # rounding 1e4 itself moves every deviation by up to 1e4 eps
    want = want.var((0, 2), correction=0)
    assert bool(((var.cpu() - want).abs() <= slack * want).all())


def test_sizes_and_dtypes_that_are_refused(norm: Any) -> None:
    sizes = {"samples": 1, "channels": 2, "size": 3, "channels_last": False}
    numbers = sizes | {"activation": 0, "negative_slope": 0.0, "slope_stride": 0, "eps": 0.0}
    for kernel in ("whole_fwd", "whole_bwd"):
        with pytest.raises(ValueError, match="cudaError 1"):
            norm._module.launch(kernel, numbers | {"samples": -1}, {}, 1)
        with pytest.raises(ValueError, match="cudaError 1"):
            norm._module.launch(kernel, numbers, {}, 4)
        with pytest.raises(ValueError, match="cudaError 1"):
            norm._module.launch(kernel, numbers | {"channels": 2**31}, {}, 1)
        norm._module.launch(kernel, numbers | {"size": 0}, {}, 1)
