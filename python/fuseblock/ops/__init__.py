"""The operators: one file holds one operator's whole contract."""

from . import _questions as _questions
from .batch_norm_act import batch_norm_act, batch_norm_act_bwd, batch_norm_act_bwd_bwd
from .batch_norm_act import check as check_batch_norm_act
from .bias_act import bias_act, bias_act_bwd, bias_act_bwd_bwd
from .bias_act import check as check_bias_act
from .conv2d_act import check as check_conv2d_act
from .conv2d_act import conv2d_act
from .conv2d_stats import check as check_conv2d_stats
from .conv2d_stats import conv2d_stats
from .conv_transpose2d_subpixel import check as check_conv_transpose2d_subpixel
from .conv_transpose2d_subpixel import conv_transpose2d_subpixel
from .lstm_gates import check as check_lstm_gates
from .lstm_gates import lstm_gates, lstm_gates_bwd, lstm_gates_bwd_bwd
from .lstm_recurrence import check as check_lstm_recurrence
from .lstm_recurrence import lstm_recurrence, lstm_recurrence_bwd, lstm_recurrence_bwd_bwd
from .norm_act_conv_bwd import norm_act_conv_bwd
from .upfirdn2d import check as check_upfirdn2d
from .upfirdn2d import upfirdn2d

__all__ = [
    "batch_norm_act",
    "batch_norm_act_bwd",
    "batch_norm_act_bwd_bwd",
    "bias_act",
    "bias_act_bwd",
    "bias_act_bwd_bwd",
    "check_batch_norm_act",
    "check_bias_act",
    "check_conv2d_act",
    "check_conv2d_stats",
    "check_conv_transpose2d_subpixel",
    "check_lstm_gates",
    "check_lstm_recurrence",
    "check_upfirdn2d",
    "conv2d_act",
    "conv2d_stats",
    "conv_transpose2d_subpixel",
    "lstm_gates",
    "lstm_gates_bwd",
    "lstm_gates_bwd_bwd",
    "lstm_recurrence",
    "lstm_recurrence_bwd",
    "lstm_recurrence_bwd_bwd",
    "norm_act_conv_bwd",
    "upfirdn2d",
]
