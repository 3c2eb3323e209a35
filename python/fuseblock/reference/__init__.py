"""The equations in plain PyTorch: the oracle of the tests and the last fallback of every operator."""

from .batch_norm_act import (
    batch_norm_act_bwd_bwd_reference,
    batch_norm_act_bwd_reference,
    batch_norm_act_reference,
)
from .lstm_gates import lstm_gates_bwd_bwd_reference, lstm_gates_bwd_reference, lstm_gates_reference
from .lstm_recurrence import (
    lstm_recurrence_bwd_bwd_reference,
    lstm_recurrence_bwd_reference,
    lstm_recurrence_reference,
)
from .upfirdn2d import upfirdn2d_reference

__all__ = [
    "batch_norm_act_bwd_bwd_reference",
    "batch_norm_act_bwd_reference",
    "batch_norm_act_reference",
    "lstm_gates_bwd_bwd_reference",
    "lstm_gates_bwd_reference",
    "lstm_gates_reference",
    "lstm_recurrence_bwd_bwd_reference",
    "lstm_recurrence_bwd_reference",
    "lstm_recurrence_reference",
    "upfirdn2d_reference",
]
