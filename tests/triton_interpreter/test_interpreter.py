"""What the hardened interpreter adds to Triton's."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("greenlet")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from . import LivelockError, OutOfBoundsError, _programs, install, program_order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled, not interpreted")
if INTERPRETED:
    install()


@triton.jit
def _double(x):
    return tl.sum(tl.zeros_like(x)) + 2 * x


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, _double(tl.load(x_ptr + offsets, mask=offsets < n)), mask=offsets < n)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + k + inner[None, :])
        b = tl.load(b_ptr + (k + inner)[:, None] * BLOCK + rows[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], acc)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK) % 2, tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _tile_sums_kernel(x_ptr, rows_ptr, cols_ptr, all_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    tl.store(rows_ptr + tl.arange(0, BLOCK), tl.sum(x, axis=0))
    tl.store(cols_ptr + tl.arange(0, BLOCK)[:, None], tl.sum(x, axis=1, keep_dims=True))
    tl.store(all_ptr, tl.sum(x))


@triton.jit
def _relay_kernel(counter_ptr, data_ptr, out_ptr):
    """Every program writes a value, waits for all of them, and adds up what the others wrote."""
    programs = tl.num_programs(0)
    me = tl.program_id(0)
    tl.store(data_ptr + me, me + 1)
    tl.atomic_add(counter_ptr, 1)
    while tl.atomic_add(counter_ptr, 0) < programs:
        pass
    total = 0
    for other in range(programs):
        total += tl.load(data_ptr + other)
    tl.store(out_ptr + me, total)


@triton.jit
def _wait_kernel(flag_ptr):
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, 64, BLOCK=16, BLOCK_K=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_casts_to_bfloat16_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat((torch.randn(28), torch.tensor([0.0, 1e-39, float("inf"), float("nan")]))).to(dtype)
    y, back = torch.empty(32, dtype=torch.bfloat16), torch.empty(32, dtype=dtype)
    _copy_kernel[(1,)](x, y, BLOCK=32)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    _copy_kernel[(1,)](y, back, BLOCK=32)
    torch.testing.assert_close(back, y.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_arithmetic_is_refused_not_wrong() -> None:
    x = torch.randn(16).to(torch.bfloat16)
    with pytest.raises(InterpreterError, match="bf"):
        _scale_kernel[(1,)](x, x, 16, BLOCK=16)


def test_dot_refuses_what_the_cuda_backend_refuses() -> None:
    a, b, out = torch.randn(16, 8), torch.randn(8, 16), torch.empty(16, 16)
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot_kernel[(1,)](a, b, out, 8, BLOCK=16, BLOCK_K=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_atomic_add_to_equal_addresses(dtype: torch.dtype) -> None:
    x, out = torch.arange(8).to(dtype), torch.zeros(2, dtype=dtype)
    _sum_kernel[(1,)](x, out, BLOCK=8)
    assert out.tolist() == [12, 16]


def test_accesses_outside_of_a_view_are_found() -> None:
    x, y = torch.randn(32), torch.zeros(32)
    _scale_kernel[(2,)](x[:20], y[:20], 20, BLOCK=16)
    assert torch.equal(y[:20], 2 * x[:20]) and not y[20:].any()
    # The storage would be large enough; the view that the kernel was given is not.
    with pytest.raises(OutOfBoundsError, match="load: 1 of 16"):
        _scale_kernel[(2,)](x[:31], y, 32, BLOCK=16)
    with pytest.raises(OutOfBoundsError, match="store: 12 of 16"):
        _scale_kernel[(2,)](x, y[:20], 32, BLOCK=16)
    _scale_kernel[(2,)](x, y, 32, BLOCK=16)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("order", ["fifo", "lifo", "random"])
def test_programs_that_wait_for_each_other(order: str) -> None:
    counter, data, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 5, 5))
    with program_order(order):
        _relay_kernel[(5,)](counter, data, out)
    assert out.tolist() == [15] * 5


def test_waiting_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_programs, "MAX_RESUMPTIONS", 50)
    with pytest.raises(LivelockError, match="1 programs still wait"):
        _wait_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


def test_sums_are_trees() -> None:
    """One large value among small ones, each below half of its last place: added one by one they all would be lost."""
    x = torch.zeros(64, 64)
    x[0], x[1:] = 2.0**24, 1.0
    rows, cols, everything = torch.zeros(64), torch.zeros(64), torch.zeros(())
    _tile_sums_kernel[(1,)](x, rows, cols, everything, BLOCK=64)
    assert bool((rows > 2.0**24 + 40).all())
    assert torch.equal(cols, x.sum(1))
    torch.testing.assert_close(everything, x.sum(dtype=torch.float64).float(), rtol=1e-6, atol=0)
