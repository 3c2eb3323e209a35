"""The per-step driver with a plain step namespace, against autograd of the plain recurrence in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuseblock.launch import per_step

from . import plain_lstm
from .lstm_cases import LstmCase, check_backward, check_forward, check_second_order

CASES = [
    LstmCase(4, 3, 5, 1, None, None),
    LstmCase(4, 3, 5, 2, None, None),
    LstmCase(5, 4, 3, 2, None, (5, 0, 2, 1)),
    LstmCase(4, 3, 5, 2, 2, None),
    LstmCase(5, 4, 3, 2, 2, (5, 0, 2, 1)),
    LstmCase(1, 1, 1, 1, None, None),
    LstmCase(3, 2, 4, 2, None, (0, 0)),
]


class Driver:
    """The three ops on plain steps."""

    @staticmethod
    def lstm_recurrence(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence(plain_lstm.PlainSteps, *args)

    @staticmethod
    def lstm_recurrence_bwd(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence_bwd(plain_lstm.PlainSteps, *args)

    @staticmethod
    def lstm_recurrence_bwd_bwd(*args: object) -> tuple[Tensor, ...]:
        return per_step.lstm_recurrence_bwd_bwd(plain_lstm.PlainSteps, *args)


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


def test_packed_sequences_are_refused() -> None:
    case = LstmCase(2, 2, 3, 1, None, None)
    gx, h0, c0, w_hh, w_hr, lengths = case.inputs(torch.float32)
    with pytest.raises(ValueError, match="batch_sizes"):
        Driver.lstm_recurrence(gx, h0, c0, w_hh, w_hr, lengths, torch.tensor([2, 2]), True)
