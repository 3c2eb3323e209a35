"""upfirdn2d on a CPU where pixels fill vectors: filters that are outer products, and those that nearly are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..backends import available
from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype
from .test_upfirdn2d import by_definition, composite, run

#: Channels: one vector, a ragged last one of each length of a strip, several strips.
CHANNELS = (16, 19, 40, 50, 72, 130)
#: Taps (y, x), up, down, padding.
CASES = [
    ((4, 4), 1, 1, (2, 1, 2, 1)),
    ((12, 12), 2, 1, (9, 8, 9, 8)),
    ((12, 12), 1, 2, (5, 5, 6, -1)),
    ((5, 7), (2, 3), (3, 2), (9, -1, 0, 7)),
    ((6, 5), 1, 1, (-2, 20, 5, -3)),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def images(channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2, channels, 9, 10, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def filters(height: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    column, row = torch.randn(height, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    column[0] = row[0] = row[2] = 0
    outer = torch.outer(column, row)
    nearly = outer.clone()
    nearly[2, 1] *= 1 + 1e-3
    beside = outer.clone()
    beside[0, 0] = outer.abs().max()
    found = {"outer": outer, "nearly": nearly, "beside": beside, "zero": torch.zeros_like(outer)}
    return {name: f.to(dtype) for name, f in found.items()}


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_products(case: int, dtype: torch.dtype) -> None:
    taps, *args = CASES[case]
    with available("cpu") as cpu:
        for channels in CHANNELS:
            x = images(channels, dtype)
            for name, f in filters(*taps, state_dtype(dtype)).items():
                want = by_definition(x.double(), f.double(), *args, gain=1.5)
                stock = composite(x, f, *args, gain=1.5)
                with poisoned_outputs():
                    got = run(cpu, x, f, *args, gain=1.5)
                assert got.is_contiguous(memory_format=torch.channels_last)
                ratio = error_ratio(got, want, relative_error(stock, want), 2 * f.numel() + 8)
                assert ratio <= 1, f"{name}, {channels} channels: error {ratio:.3g} times the allowed one"


def test_large_pixels_stay_finite() -> None:
    """Sums along x alone are no larger than pixels, however small the first tap is."""
    row = torch.tensor([1e-6, 1.0, 1.0, 1e-6])
    x = torch.full((1, 16, 8, 8), 1e35).contiguous(memory_format=torch.channels_last)
    with available("cpu") as cpu:
        y = run(cpu, x, torch.outer(row, row))
    torch.testing.assert_close(y, torch.full_like(y, 4e35), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, 33, 31).to(dtype).contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    with available("cpu") as cpu:
        for f in (torch.randn(5, 4), torch.outer(torch.randn(5), torch.randn(4))):
            try:
                torch.set_num_threads(1)
                want = run(cpu, x, f, 1, 1, 2)
                for count in (2, 3):
                    torch.set_num_threads(count)
                    assert torch.equal(run(cpu, x, f, 1, 1, 2), want)
            finally:
                torch.set_num_threads(threads)
