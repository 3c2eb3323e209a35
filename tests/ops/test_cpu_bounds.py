"""The CPU kernels read nothing before and behind their inputs: forbidden pages lie there, which end the process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseblock import _ext

from ..backends import Forced
from . import test_lstm_layer_cpu as layers
from .lstm_cases import LstmCase, check_backward, check_forward, check_second_order
from .test_lstm_gates import inputs as gates_inputs

pytestmark = [
    pytest.mark.skipif(_ext.why_not is not None, reason=str(_ext.why_not)),
    pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def fenced(x: Tensor, end: bool) -> Tensor:
    """A contiguous copy that ends, or begins, where a page does, between two pages that cannot be read."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    if size == 0:
        return x
    memory = mmap.mmap(-1, (-(-size // page) + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place in (0, len(memory) - page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + place), ctypes.c_size_t(page), 0) == 0
    start = len(memory) - page - size if end else page
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    return copy.copy_(x)


class Fenced:
    """Operators whose inputs are fenced."""

    def __init__(self, ops: Any, end: bool) -> None:
        self._ops, self._end = ops, end

    def __getattr__(self, name: str) -> Any:
        return lambda *args: getattr(self._ops, name)(*map(self._moved, args))

    def _moved(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._moved(y) for y in x]
        return fenced(x, self._end) if isinstance(x, Tensor) else x


ends = pytest.mark.parametrize("end", [False, True], ids=["before", "behind"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@ends
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        LstmCase(2, 2, 11, 1, None, None),  # so few rows that the weights are not packed
        LstmCase(1, 3, 11, 1, 6, None),
        LstmCase(3, 1, 5, 2, 3, None),
        LstmCase(3, 7, 37, 2, None, (1, 3, 0, 2, 3, 1, 2)),
        LstmCase(3, 7, 21, 2, 5, None),
    ],
    ids=str,
)
def test_recurrence(case: LstmCase, dtype: torch.dtype, end: bool) -> None:
    for check in (check_forward, check_backward, check_second_order):
        check(Fenced(Forced("cpu"), end), case, dtype)


@ends
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        layers.Case(3, 1, 3, 5),
        layers.Case(3, 7, 11, 37, directions=2, packed=True),
        layers.Case(2, 5, 6, 9, biased=False),
    ],
    ids=str,
)
def test_layer(case: layers.Case, dtype: torch.dtype, end: bool) -> None:
    layers.check(case, dtype, ops=Fenced(torch.ops.fuseblock_cpu, end))


@ends
@dtypes
def test_gates(dtype: torch.dtype, end: bool) -> None:
    gates, c = gates_inputs((3, 13), dtype)
    plain = Forced("cpu")
    ours = Fenced(plain, end)
    dh, v = c.to(dtype), torch.randn_like(gates)
    for op, args in {
        "lstm_gates": (gates, c),
        "lstm_gates_bwd": (dh, c, gates, c),
        "lstm_gates_bwd_bwd": (v, c, dh, c, gates, c),
    }.items():
        assert all(map(torch.equal, getattr(ours, op)(*args), getattr(plain, op)(*args)))


@ends
@dtypes
@pytest.mark.parametrize("channels", [1, 3, 16, 19, 50])
def test_filtered_images(channels: int, dtype: torch.dtype, end: bool) -> None:
    taps = torch.randn(4, 4, dtype=torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 5, 7, channels).to(dtype)
    run = torch.ops.fuseblock_cpu.upfirdn2d
    for f in (taps, torch.outer(taps[0], taps[1])):
        for up, down in ((1, 1), (2, 1), (1, 2)):
            args = (up, up, down, down, 2, 1, 2, 1, False, 1.0)
            got, want = (
                run(y.permute(0, 3, 1, 2), w, *args) for y, w in ((fenced(x, end), fenced(f, end)), (x, f))
            )
            assert torch.equal(got, want)
