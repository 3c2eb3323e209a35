"""Operator lstm_recurrence on every backend: values, derivatives, ragged layouts, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import functional, ops
from fuseblock.reference import (
    lstm_recurrence_bwd_bwd_reference,
    lstm_recurrence_bwd_reference,
    lstm_recurrence_reference,
)

from ..backends import Forced
from .lstm_cases import LstmCase, check_backward, check_forward, check_second_order, poisoned_outputs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CASES = [
    LstmCase(1, 1, 1, 1, None, None),
    LstmCase(4, 3, 5, 1, None, None),
    LstmCase(5, 4, 33, 2, None, (5, 0, 2, 1)),
    LstmCase(3, 5, 16, 2, 7, None),
    LstmCase(4, 3, 5, 2, 2, (1, 4, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(forced: Forced, case: LstmCase, dtype: torch.dtype) -> None:
    check_forward(forced, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(forced: Forced, case: LstmCase, dtype: torch.dtype) -> None:
    check_backward(forced, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_order(forced: Forced, case: LstmCase, dtype: torch.dtype) -> None:
    check_second_order(forced, case, dtype)


def test_missing_cotangents_mean_zeros(forced: Forced) -> None:
    case = LstmCase(4, 3, 5, 2, 2, (4, 0, 3))
    for given in range(5):
        check_backward(forced, case, torch.float64, given=(given,))
    for given in range(4):
        check_second_order(forced, case, torch.float64, v_given=(given,), d_given=(given,))


PACKED = [(3, 3, 2, 1), (1,), (5, 1, 1), (4, 4, 4)]


def packed_inputs(sizes: tuple[int, ...], directions: int, hidden: int, proj: int | None) -> tuple[Any, ...]:
    rows, batch, p = sum(sizes), sizes[0], proj or hidden
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    w_hr = None if proj is None else new(directions, proj, hidden)
    return (
        new(rows, directions * 4 * hidden),
        new(directions, batch, p),
        new(directions, batch, hidden),
        new(directions, 4 * hidden, p),
        w_hr,
        None,
        torch.tensor(sizes),
    )


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("proj", [None, 2])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", PACKED, ids=str)
def test_packed(name: str, sizes: tuple[int, ...], directions: int, proj: int | None) -> None:
    """Packed rows give what the same sequences give one by one, in every order of derivative."""
    args = packed_inputs(sizes, directions, 3, proj)
    gx, h0, c0, w_hh, w_hr, _, batch_sizes = args
    forced = Forced(name)
    with poisoned_outputs():
        y, h_n, c_n, gates, c = forced.lstm_recurrence(*args, True)
    starts = batch_sizes.cumsum(0) - batch_sizes
    for b in range(sizes[0]):
        rows = [int(starts[t]) + b for t, n in enumerate(sizes) if b < n]
        single = lstm_recurrence_reference(
            gx[rows].unsqueeze(1), h0[:, b : b + 1], c0[:, b : b + 1], w_hh, w_hr
        )
        for got, want in zip((y[rows], h_n[:, b], c_n[:, b], gates[rows], c[rows]), single, strict=True):
            torch.testing.assert_close(got, want.squeeze(1), rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn_like(x) for x in (y, h_n, c_n, gates, c)]
    saved = (gates, c, c0, w_hh, w_hr, None, batch_sizes)
    got_bwd = forced.lstm_recurrence_bwd(*cotangents, *saved)
    want_bwd = lstm_recurrence_bwd_reference(*cotangents, *saved)
    v = [torch.randn_like(x) for x in want_bwd]
    got_second = forced.lstm_recurrence_bwd_bwd(
        *v[:3], v[3] if proj else None, *cotangents, *saved, got_bwd[0]
    )
    want_second = lstm_recurrence_bwd_bwd_reference(
        *v[:3], v[3] if proj else None, *cotangents, *saved, got_bwd[0]
    )
    for got, want in zip((*got_bwd, *got_second), (*want_bwd, *want_second), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kind", ["plain", "lengths", "projection"])
@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck_and_gradgradcheck(forced: Forced, kind: str, directions: int) -> None:
    proj = 2 if kind == "projection" else 3
    fast = forced.name in ("triton", "cuda")  # interpreted and emulated kernels take milliseconds a call
    steps = 2 if fast else 3
    lengths = torch.tensor([steps, 0]) if kind == "lengths" else None
    inputs = leaves(
        (steps, 2, directions * 12), (directions, 2, proj), (directions, 2, 3), (directions, 12, proj)
    )
    if kind == "projection":
        inputs += leaves((directions, proj, 3))
    inputs = [x.detach().to(forced.device).requires_grad_() for x in inputs]
    lengths = None if lengths is None else lengths.to(forced.device)

    def layer(*args: Tensor) -> Any:
        w_hr = args[4] if len(args) == 5 else None
        return ops.lstm_recurrence(*args[:4], w_hr, lengths, None, True)

    with fuseblock.backend(forced.name):
        assert torch.autograd.gradcheck(layer, inputs, fast_mode=fast)
        assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=fast)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", [(3, 2, 2, 1)], ids=str)
def test_gradgradcheck_of_packed_rows(sizes: tuple[int, ...], directions: int) -> None:
    gx, h0, c0, w_hh, *_ = packed_inputs(sizes, directions, 3, None)
    inputs = [x.requires_grad_() for x in (gx, h0, c0, w_hh)]

    def layer(*args: Tensor) -> Any:
        return functional.lstm_recurrence(*args, batch_sizes=torch.tensor(sizes))

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_saved_state_is_the_same_on_all_backends(forced: Forced) -> None:
    """Any backend's forward can meet any backend's backward: they save the same tensors."""
    *tensors, lengths = LstmCase(5, 4, 6, 2, None, (5, 0, 2, 1)).inputs(torch.float64)
    got = forced.lstm_recurrence(*tensors, lengths, None, True)
    want = lstm_recurrence_reference(*tensors, lengths)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded weight"])
def test_layouts(forced: Forced, layout: str) -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(4, 3, 5, 2, None, None).inputs(torch.float64)
    want = lstm_recurrence_reference(gx, h0, c0, w_hh)
    if layout == "permuted":
        gx, h0, c0 = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (gx, h0, c0))
        w_hh = w_hh.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        gx, h0, c0, w_hh = (torch.cat([x, x + 1], -1)[..., : x.shape[-1]] for x in (gx, h0, c0, w_hh))
    else:
        w_hh = w_hh[:1].expand_as(w_hh)
        want = lstm_recurrence_reference(gx, h0, c0, w_hh)
    got = forced.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 7, 129])
@pytest.mark.parametrize("hidden", [1, 8, 50, 257])
def test_odd_sizes_on_cpu(hidden: int, batch: int) -> None:
    case = LstmCase(3, batch, hidden, 2, None, None)
    forced = Forced("cpu")
    for check in (check_forward, check_backward, check_second_order):
        check(forced, case, torch.float32)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case",
    [LstmCase(6, 2, 390, 1, None, (6, 1)), LstmCase(5, 3, 300, 1, 200, (2, 5, 1))],
    ids=str,
)
def test_units_shared_by_cpu_threads(case: LstmCase, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    for check in (check_forward, check_backward, check_second_order):
        check(Forced("cpu"), case, torch.float32)


def test_more_cpu_threads_than_rows_worth_one(set_threads: Callable[[int], None]) -> None:
    """Threads that get no rows, since one sequence is most of the work."""
    set_threads(8)
    for check in (check_forward, check_backward):
        check(Forced("cpu"), LstmCase(200, 4, 64, 1, None, (1, 200, 1, 1)), torch.float64)


def test_run_to_run_equal(forced: Forced) -> None:
    *tensors, lengths = LstmCase(4, 9, 17, 2, None, None).inputs(torch.float32)
    first, second = (forced.lstm_recurrence(*tensors, lengths, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_sequence_step_by_step_is_the_sequence(forced: Forced) -> None:
    """In 16 bit too: the carried h is the h that y shows, so T calls of one step give what one call of T steps does."""
    gx, h, c, w_hh, _, _ = LstmCase(5, 2, 8, 1, None, None).inputs(torch.bfloat16)
    y, h_n, c_n, _, _ = forced.lstm_recurrence(gx, h, c, w_hh, None, None, None, False)
    for t in range(5):
        y_t, h, c, _, _ = forced.lstm_recurrence(gx[t : t + 1], h, c, w_hh, None, None, None, False)
        assert torch.equal(y_t[0], y[t])
    assert torch.equal(h, h_n)
    assert torch.equal(c, c_n)


def test_seventy_thousand_steps() -> None:
    gx, h0, c0, w_hh = (
        0.1 * torch.randn(*shape) for shape in ((70_000, 2, 12), (1, 2, 3), (1, 2, 3), (1, 12, 3))
    )
    gx.requires_grad_()
    y, h_n, _ = functional.lstm_recurrence(gx, h0, c0, w_hh)
    torch.testing.assert_close(y[-1], h_n[0], rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y[-1].sum(), gx)
    tail = gx.detach()[-200:].clone().requires_grad_()
    y_tail, _, _ = lstm_recurrence_reference(tail, y[-201:-200].detach(), torch.zeros_like(c0), w_hh)[:3]
    (want,) = torch.autograd.grad(y_tail[-1].sum(), tail)
    torch.testing.assert_close(grad[-20:], want[-20:], rtol=1e-4, atol=1e-6)


def good() -> dict[str, Any]:
    gx, h0, c0, w_hh, _, _ = LstmCase(4, 3, 5, 1, None, None).inputs(torch.float32)
    return {"gx": gx, "h0": h0, "c0": c0, "w_hh": w_hh}


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "no steps": (lambda a: a | {"gx": a["gx"][:0]}, ValueError, "T = 0"),
    "gx width": (lambda a: a | {"gx": a["gx"][..., :-1]}, ValueError, "expected gx of shape"),
    "gx batch": (lambda a: a | {"gx": a["gx"][:, :2]}, ValueError, "expected gx of shape"),
    "h0 rank": (lambda a: a | {"h0": a["h0"][0]}, ValueError, "expected h0"),
    "h0 width": (lambda a: a | {"h0": a["h0"][..., :-1]}, ValueError, "expected h0"),
    "c0 directions": (lambda a: a | {"c0": a["c0"].expand(3, -1, -1)}, ValueError, "expected c0"),
    "w_hh shape": (lambda a: a | {"w_hh": a["w_hh"][:, :-1]}, ValueError, "expected w_hh"),
    "w_hr shape": (lambda a: a | {"w_hr": torch.zeros(1, 2, 5)}, ValueError, "expected w_hr"),
    "gx integer": (lambda a: {k: v.long() for k, v in a.items()}, TypeError, "floating point"),
    "w_hh dtype": (lambda a: a | {"w_hh": a["w_hh"].double()}, TypeError, "expected w_hh of dtype"),
    "c0 dtype": (lambda a: a | {"c0": a["c0"].double()}, TypeError, "expected c0 of dtype"),
    "lengths dtype": (
        lambda a: a | {"lengths": torch.tensor([1.0, 2.0, 3.0])},
        ValueError,
        "expected lengths",
    ),
    "lengths shape": (lambda a: a | {"lengths": torch.tensor([1, 2])}, ValueError, "expected lengths"),
    "lengths too long": (lambda a: a | {"lengths": torch.tensor([1, 2, 5])}, ValueError, "lengths within"),
    "lengths negative": (lambda a: a | {"lengths": torch.tensor([1, 2, -1])}, ValueError, "lengths within"),
    "both layouts": (
        lambda a: a | {"lengths": torch.tensor([1, 2, 3]), "batch_sizes": torch.tensor([3, 3])},
        ValueError,
        "not both",
    ),
    "batch_sizes rising": (
        lambda a: a | {"gx": a["gx"].flatten(0, 1)[:5], "batch_sizes": torch.tensor([2, 3])},
        ValueError,
        "non-increasing",
    ),
    "batch_sizes sum": (
        lambda a: a | {"gx": a["gx"].flatten(0, 1), "batch_sizes": torch.tensor([3, 3])},
        ValueError,
        "sum",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input(mistake: str) -> None:
    change, error, message = MISTAKES[mistake]
    functional.lstm_recurrence(**good())
    with pytest.raises(error, match=message):
        functional.lstm_recurrence(**change(good()))


def test_non_finite_weights_give_non_finite_results(forced: Forced) -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(3, 2, 4, 1, None, None).inputs(torch.float32)
    w_hh = w_hh.clone()
    w_hh[0, 0, 0] = float("nan")
    y, *_ = forced.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, False)
    want, *_ = lstm_recurrence_reference(gx, h0, c0, w_hh)
    torch.testing.assert_close(y, want, equal_nan=True)
    assert y.isnan().any()


def test_backward_without_saved_state_raises() -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(3, 2, 4, 1, None, None).inputs(torch.float32)
    y, *_ = ops.lstm_recurrence(gx.requires_grad_(), h0, c0, w_hh, None, None, None, False)
    with pytest.raises(RuntimeError, match="save_state=True"):
        y.sum().backward()


def test_autocast_keeps_the_cell_state_in_float32() -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(3, 2, 4, 1, None, None).inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, h_n, c_n = functional.lstm_recurrence(gx, h0, c0, w_hh)
    assert (y.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want, _, _ = functional.lstm_recurrence(gx.bfloat16(), h0.bfloat16(), c0, w_hh.bfloat16())
    assert torch.equal(y, want)


@pytest.mark.parametrize("kind", ["plain", "lengths", "projection", "packed"])
def test_opcheck(kind: str) -> None:
    if kind == "packed":
        gx, h0, c0, w_hh, w_hr, lengths, batch_sizes = packed_inputs((3, 2), 2, 3, None)
    else:
        case = LstmCase(
            3, 2, 4, 2, 2 if kind == "projection" else None, (3, 1) if kind == "lengths" else None
        )
        gx, h0, c0, w_hh, w_hr, lengths = case.inputs(torch.float64)
        batch_sizes = None
    w_hr = None if w_hr is None else w_hr.requires_grad_()
    weights = (w_hh.requires_grad_(), w_hr, lengths, batch_sizes)
    inputs = (gx.requires_grad_(), h0.requires_grad_(), c0.requires_grad_(), *weights)
    torch.library.opcheck(torch.ops.fuseblock.lstm_recurrence.default, (*inputs, True))
    y, _, _, gates, c = (x.detach() for x in ops.lstm_recurrence(*inputs, True))
    bwd = (
        y.requires_grad_(),
        None,
        None,
        None,
        None,
        gates.requires_grad_(),
        c.requires_grad_(),
        c0,
        *weights,
    )
    torch.library.opcheck(torch.ops.fuseblock.lstm_recurrence_bwd.default, bwd)
    dgx, *_ = ops.lstm_recurrence_bwd(*bwd)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in bwd]
    second = (dgx.detach(), None, None, None, *plain, dgx.detach())
    torch.library.opcheck(torch.ops.fuseblock.lstm_recurrence_bwd_bwd.default, second)
