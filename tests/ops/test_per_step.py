"""The per-step driver with a plain step namespace, against autograd of the plain recurrence in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseblock.launch import per_step

from . import plain_lstm
from .lstm_cases import LstmCase, check_backward, check_forward, check_second_order

# Matrix products into tensors of the wrong shape resize them: the result is right, and a captured graph would not be.
pytestmark = pytest.mark.filterwarnings("error:An output with one or more elements was resized")

CASES = [
    LstmCase(4, 3, 5, 1, None, None),
    LstmCase(4, 3, 5, 2, None, None),
    LstmCase(5, 4, 3, 2, None, (5, 0, 2, 1)),
    LstmCase(4, 3, 5, 2, 2, None),
    LstmCase(5, 4, 3, 2, 2, (5, 0, 2, 1)),
    LstmCase(1, 1, 1, 1, None, None),
    LstmCase(3, 2, 4, 2, None, (0, 0)),
]


def strict(step: Callable[..., None], only_with_lengths: str) -> Callable[..., None]:
    """The step, after a look at what `per_step.StepKernels` promises to it."""
    names = list(inspect.signature(step).parameters)

    def checked(*args: Any) -> None:
        given = dict(zip(names, args, strict=True))
        for name, x in given.items():
            if isinstance(x, Tensor) and name != "lengths":
                assert x.dim() == 2, name
                assert x.stride(-1) == 1 or x.shape[-1] == 1, f"{name} has strides {x.stride()}"
        assert given["lengths"] is not None or given[only_with_lengths] is None
        assert given["lengths"] is None or given["lengths"].is_contiguous()
        step(*args)

    return checked


class StrictSteps:
    """Plain steps that refuse what kernels could not take."""

    step_fwd = staticmethod(strict(plain_lstm.PlainSteps.step_fwd, "h_state"))
    step_bwd = staticmethod(strict(plain_lstm.PlainSteps.step_bwd, "dm_keep"))
    step_bwd_bwd = staticmethod(strict(plain_lstm.PlainSteps.step_bwd_bwd, "a_dm_state"))


class Driver:
    """The three ops on plain steps."""

    @staticmethod
    def lstm_recurrence(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence(StrictSteps, *args)

    @staticmethod
    def lstm_recurrence_bwd(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence_bwd(StrictSteps, *args)

    @staticmethod
    def lstm_recurrence_bwd_bwd(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence_bwd_bwd(StrictSteps, *args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: LstmCase, dtype: torch.dtype) -> None:
    check_forward(Driver, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: LstmCase, dtype: torch.dtype) -> None:
    check_backward(Driver, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_order(case: LstmCase, dtype: torch.dtype) -> None:
    check_second_order(Driver, case, dtype)


def test_missing_cotangents_mean_zeros() -> None:
    case = LstmCase(4, 3, 5, 2, 2, (4, 0, 3))
    for given in range(5):
        check_backward(Driver, case, torch.float64, given=(given,))
    for given in range(4):
        check_second_order(Driver, case, torch.float64, v_given=(given,), d_given=(given,))


@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_any_strides_of_cotangents_and_states(case: LstmCase) -> None:
    """Cotangents that are one expanded number, a c0 whose last dimension is not contiguous, lengths that are a column."""
    gx, h0, c0, w_hh, w_hr, lengths = case.inputs(torch.float64)
    if lengths is not None:
        lengths = torch.stack((lengths, lengths), 1)[:, 0]
    y, h_n, c_n, gates, c = Driver.lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, None, True)
    cotangents = [torch.full((), 0.5, dtype=torch.float64).expand(x.shape) for x in (y, h_n, c_n, gates, c)]
    strided = c0.transpose(1, 2).contiguous().transpose(1, 2)

    def derivatives(cotangents: list[Tensor], c0: Tensor) -> list[Tensor]:
        saved = (gates, c, c0, w_hh, w_hr, lengths, None)
        first = Driver.lstm_recurrence_bwd(*cotangents, *saved)
        v = [torch.ones_like(first[0]), *cotangents[1:3], None if w_hr is None else cotangents[0]]
        return [*first, *Driver.lstm_recurrence_bwd_bwd(*v, *cotangents, *saved, first[0])]

    want = derivatives([x.contiguous() for x in cotangents], c0)
    for a, b in zip(derivatives(cotangents, strided), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.is_contiguous()


def test_two_dimensional_gates_are_refused() -> None:
    gx, h0, c0, w_hh, w_hr, lengths = LstmCase(2, 2, 3, 1, None, None).inputs(torch.float32)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(T, B, D\*4H\), got \(2, 12\)"):
        Driver.lstm_recurrence(gx[0], h0, c0, w_hh, w_hr, lengths, None, True)


def test_packed_sequences_are_refused() -> None:
    case = LstmCase(2, 2, 3, 1, None, None)
    gx, h0, c0, w_hh, w_hr, lengths = case.inputs(torch.float32)
    y, h_n, c_n, gates, c = Driver.lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, None, True)
    sizes = torch.tensor([2, 2])
    cotangents, saved = (y, h_n, c_n, None, None), (gates, c, c0, w_hh, w_hr, lengths, sizes)
    with pytest.raises(ValueError, match="batch_sizes"):
        Driver.lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, sizes, True)
    with pytest.raises(ValueError, match="batch_sizes"):
        Driver.lstm_recurrence_bwd(*cotangents, *saved)
    with pytest.raises(ValueError, match="batch_sizes"):
        Driver.lstm_recurrence_bwd_bwd(None, None, None, None, *cotangents, *saved, gates)
