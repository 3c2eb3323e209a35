"""The Triton and CUDA kernels of batch_norm_act, one by one, against plain formulas in float64.

Triton runs in the hardened interpreter and CUDA in the emulator, or both on a GPU where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseblock._activations import NAMES

from ..backends import DEVICE
from .batch_norm_act_formulas import Case, check_all

_ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Every activation in both layouts; what is saved of the residual, odd rows (35, 5), whole bytes (24, 16) in turn.
CASES = [
    *(Case((2, 3, 7, 5), last, activation) for activation in NAMES for last in (False, True)),
    *(Case((3, 5, 7, 5), last, "relu", saved="mask") for last in (False, True)),
    *(Case((3, 16, 24), last, "leaky_relu", saved="mask") for last in (False, True)),
    *(Case((3, 5, 7), last, "relu", saved="residual") for last in (False, True)),
    *(Case((3, 16, 24), last, "leaky_relu", saved="residual") for last in (False, True)),
    *(Case((2, 16, 4, 4), last, activation, saved="residual") for activation in ("silu", "prelu") for last in (False, True)),
    Case((9, 5), True, "prelu", one_slope=True),
    Case((9, 16), True, "relu", affine=False, saved="residual"),
    Case((2, 3, 2, 2, 3), True, "elu", affine=False),
    Case((1, 1, 1, 1), False, "tanh"),
    Case((4, 1, 1), False, "relu", saved="residual"),
    *(
        Case((2, 16, 4, 12), last, activation, dtype, saved=saved)
        for dtype in DTYPES[1:]
        for last, activation, saved in [
            (False, "leaky_relu", "residual"),
            (True, "leaky_relu", "mask"),
            (False, "silu", "residual"),
            (True, "prelu", None),
            (True, "tanh", None),
            (False, "elu", None),
        ]
    ),
    Case((1, 1, 5, 7), False, "leaky_relu", torch.float32, saved="mask"),
    # An odd number of positions, where two threads share vectors in the second order.
    Case((3, 24, 5, 7), True, "relu", torch.bfloat16, saved="mask"),
    Case((1, 8, 1, 1), True, "silu", torch.bfloat16, saved="residual"),
    Case((3, 40, 3, 3), True, "prelu", torch.float16, saved="residual"),
    Case((2, 16, 4, 4), False, "silu", torch.bfloat16, saved="residual", offset=1),
    Case((2, 16, 4, 4), True, "relu", torch.float32, saved="residual", offset=3),
    Case((2, 16, 4, 4), True, "relu", torch.float32, saved="mask", offset=2),
]  # fmt: skip


def triton_kernels() -> Any:
    """The launchers' module, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        from ..triton_interpreter import install

        install()
    from fuseblock.launch import triton_batch_norm_act

    return triton_batch_norm_act


def cuda_kernels() -> Any:
    """The compiled kernels, in the emulator where there is no GPU."""
    from fuseblock.launch.cuda_batch_norm_act import CudaKernels

    if DEVICE == "cuda":
        return CudaKernels(torch.ops.fuseblock_cuda)
    from ..emulator import load_norm

    return load_norm().kernels


@pytest.fixture(params=[pytest.param(name, marks=_ON_GPU) for name in ("triton", "cuda")])
def kernels(request: pytest.FixtureRequest) -> Any:
    return triton_kernels() if request.param == "triton" else cuda_kernels()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(kernels: Any, case: Case) -> None:
    check_all(kernels, case, DEVICE)


#: More than one tile and program of every kind in Triton with small blocks.
SMALL_BLOCKS = [
    Case((2, 5, 35), False, "tanh", torch.float32, saved="residual"),
    Case((2, 19, 3), True, "prelu", saved="residual"),
    Case((2, 5, 35), False, "leaky_relu", saved="residual"),
    Case((2, 24, 7), True, "leaky_relu", torch.bfloat16, saved="residual"),
]


@pytest.mark.parametrize("case", SMALL_BLOCKS, ids=str)
def test_small_blocks_of_triton(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = triton_kernels()
    monkeypatch.setattr(launcher, "blocks", lambda layout, row, others, tile: (16, 4))
    monkeypatch.setattr(launcher, "programs", lambda chunks, channel_blocks: min(chunks, 3))
    monkeypatch.setattr(launcher, "COMBINE_TILE", 64)
    check_all(launcher, case, DEVICE)


#: Several blocks of every kind and several visits of a thread in CUDA: over channels (C > 32 vectors) and positions.
SEVERAL_BLOCKS = [
    Case((3, 2, 1600), False, "silu", torch.float32, saved="residual"),
    Case((2, 1, 33, 131), False, "relu", saved="residual"),
    Case((70, 5), True, "prelu", saved="residual"),
    Case((35, 264, 1, 2), True, "leaky_relu", torch.bfloat16, saved="residual"),
    Case((300, 2), True, "tanh", torch.float16),
]


@pytest.mark.parametrize("case", SEVERAL_BLOCKS, ids=str)
def test_several_blocks_of_cuda(case: Case) -> None:
    check_all(cuda_kernels(), case, DEVICE)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_far_from_zero(kernels: Any, dtype: torch.dtype, last: bool) -> None:
    """A mean of ten thousand deviations, and a first value that is far from all others."""
    x = Case((3, 4, 40), last, "identity", dtype).elements(0)
    x[:, 1] += 1e4
    x[0, 2, 0] = 1e4
    mean, m2 = kernels.stats(x.to(DEVICE)).cpu().double()
    wide = x.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mean, wide.mean((0, 2)), rtol=4 * eps, atol=4 * eps)
    # Rounding 1e4 itself moves every deviation by up to 1e4 eps.
    want = wide.var((0, 2), correction=0) * 120
    slack = torch.tensor([1.0, 1e4, 1.0, 1.0]).double() * 64 * eps
    assert bool(((m2 - want).abs() <= slack * want).all()), (m2, want)


def test_nothing(kernels: Any) -> None:
    """Sums of nothing are zero, and results of nothing empty."""
    for shape in [(0, 3, 4), (2, 3, 0), (0, 3)]:
        site, _ = Case((2, 3), True, "silu", torch.float32).site()
        empty = torch.empty(shape, device=DEVICE)
        site = replace(site, **{n: getattr(site, n).to(DEVICE) for n in ("mean", "invstd", "weight", "bias")})
        site = replace(site, x=empty)
        assert kernels.stats(empty).tolist() == [[0.0] * 3] * 2
        assert kernels.fwd_apply(site, False)[0].shape == shape
        assert kernels.bwd_reduce(empty, site).tolist() == [[0.0] * 3] * 2
        assert kernels.bwd_apply(empty, site, torch.zeros(3, 3, device=DEVICE), False)[0].shape == shape
        assert kernels.bwd_bwd_reduce(empty, None, empty, site).tolist() == [[0.0] * 3] * 10
        k = torch.zeros(9, 3, device=DEVICE)
        assert [x.shape for x in kernels.bwd_bwd_apply(empty, None, empty, site, k)[:2]] == [shape] * 2


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(kernels: Any, bad: float, last: bool) -> None:
    case = Case((2, 3, 5, 7), last, "leaky_relu", torch.float32)
    site, _ = case.site()
    site.x[1, 1, 2, 3] = bad
    dy, v = case.elements(3), case.elements(4)
    site = replace(
        site, **{n: getattr(site, n).to(DEVICE) for n in ("x", "mean", "invstd", "weight", "bias")}
    )
    dy, v = dy.to(DEVICE), v.to(DEVICE)
    of_stats, of_first = kernels.stats(site.x), kernels.bwd_reduce(dy, site)
    for sums in (of_stats, of_first, kernels.bwd_bwd_reduce(v, None, dy, site)):
        assert sums[:, [0, 2]].isfinite().all()
        assert not sums[:, 1].isfinite().all()
    y, _ = kernels.fwd_apply(site, False)
    assert int((~y.isfinite()).sum()) == 1
    assert not bool(y[1, 1, 2, 3].isfinite())


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_results_repeat_whatever_the_order_of_threads(last: bool) -> None:
    """Bit for bit: no sum depends on who comes first."""
    if DEVICE == "cuda":
        pytest.skip("the order of threads is the emulator's")
    from ..emulator import load_norm

    norm = load_norm()
    case = Case((3, 2, 1600) if not last else (70, 5, 2), last, "silu", torch.float32)
    site, _ = case.site()
    dy, v = case.elements(3), case.elements(4)

    def run() -> list[torch.Tensor]:
        k = norm.kernels
        return [k.stats(site.x), k.bwd_reduce(dy, site), k.bwd_bwd_reduce(v, None, dy, site)]

    want = run()
    for seed in (1, 2):
        norm.set_seed(seed)
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
        finally:
            norm.set_seed(0)


def test_cuda_reads_vectors_where_rows_are_aligned() -> None:
    """Threads of the last launch over the channels of a position: 16 bytes each, 4 channels at most in the second order."""
    if DEVICE == "cuda":
        pytest.skip("launches are the emulator's")
    from ..emulator import load_norm

    norm = load_norm()
    for dtype, offset, wide, second in [
        (torch.float64, 0, 1, 1),
        (torch.float32, 0, 4, 4),
        (torch.bfloat16, 0, 8, 4),
        (torch.bfloat16, 1, 1, 1),
        (torch.float32, 2, 1, 1),
    ]:
        case = Case((40, 16, 2), True, "relu", dtype, offset=offset)
        site, _ = case.site()
        dy = case.elements(3)

        def width(across: int = 16) -> int:
            return across // norm.last_launch()[2]

        norm.kernels.bwd_apply(dy, site, torch.zeros(3, 16, dtype=site.mean.dtype), True)
        assert width() == wide
        norm.kernels.bwd_bwd_apply(dy, None, dy, site, torch.zeros(9, 16, dtype=site.mean.dtype))
        assert width() == second


def test_cudas_reductions_are_not_split_into_crumbs() -> None:
    """Blocks for every multiprocessor of a large GPU, none with less than 16 elements a thread, and 256 shares at most."""
    if DEVICE == "cuda":
        pytest.skip("launches are the emulator's")
    from ..emulator import load
    from ..emulator.bias_act import EmulatedBiasAct

    kernels = load()
    for shape, last, splits in [
        ((8, 64, 8, 8), True, 8),
        ((8, 8, 32, 32), True, 16),
        ((2, 3, 5, 7), True, 1),
        ((16, 512, 16, 16), True, 128),
        ((64, 64, 128, 128), True, 256),
        ((64, 1024, 64, 64), True, 66),
        ((8, 64, 8, 8), False, 1),
        ((64, 64, 128, 128), False, 9),
        ((64, 1, 128, 128), False, 256),
    ]:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, device="meta", memory_format=layout)
        constants = {"activation": 0, "negative_slope": 0.0, "gain": 1.0, "clamp": 1.0}
        assert kernels.norm._module.splits(kernels.norm.numbers(x)) == splits, shape
        assert kernels.bias_act_kernels._module.splits(EmulatedBiasAct.sizes(x) | constants) == splits, shape


def test_sizes_and_dtypes_that_cuda_refuses() -> None:
    if DEVICE == "cuda":
        pytest.skip("the launchers are called through the emulator")
    from ..emulator import load_norm

    module = load_norm()._module
    sizes = {"samples": 1, "channels": 2, "size": 3, "channels_last": False}
    numbers = sizes | {"activation": 0, "negative_slope": 0.0, "slope_stride": 0, "eps": 0.0}
    kernels = ("stats", "fwd", "bwd_reduce", "bwd", "bwd_bwd_reduce", "bwd_bwd")
    for kernel in kernels:
        for wrong in ({"samples": -1}, {"channels": -1}, {"size": -1}):
            with pytest.raises(ValueError, match="cudaError 1"):
                module.launch(kernel, numbers | wrong, {}, 1)
        with pytest.raises(ValueError, match="cudaError 1"):
            module.launch(kernel, numbers, {}, 4)
        for nothing in ({"samples": 0}, {"channels": 0}, {"size": 0}):
            module.launch(kernel, numbers | nothing, {}, 1)
        huge = {"channels": 2**31, "size": 2**13} if kernel == "fwd" else {"channels": 2**31}
        with pytest.raises(ValueError, match="cudaError 1"):
            module.launch(kernel, numbers | huge, {}, 1)
