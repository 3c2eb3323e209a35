"""What users call: functions with argument checks, shapes and equations; the modules of `fuseblock.nn` stand on them."""

from ._conv import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from ._lstm import lstm, lstm_cell, lstm_gates, lstm_recurrence
from ._upfirdn2d import downsample2d, filter2d, upfirdn2d, upsample2d

__all__ = [
    "conv1d",
    "conv2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "downsample2d",
    "filter2d",
    "lstm",
    "lstm_cell",
    "lstm_gates",
    "lstm_recurrence",
    "upfirdn2d",
    "upsample2d",
]
