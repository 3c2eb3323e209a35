"""What users call: functions with argument checks, shapes and equations; the modules of `fuseblock.nn` stand on them."""

from ._bias_act import bias_act
from ._conv import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from ._conv_stats import conv2d_act, conv2d_stats, conv_transpose2d_act, conv_transpose2d_subpixel
from ._instance_norm import instance_norm_act
from ._lstm import lstm, lstm_cell, lstm_gates, lstm_recurrence
from ._minibatch import minibatch_stddev
from ._norm import batch_norm_act
from ._spectral import spectral_norm
from ._upfirdn2d import downsample2d, filter2d, upfirdn2d, upsample2d

__all__ = [
    "batch_norm_act",
    "bias_act",
    "conv1d",
    "conv2d",
    "conv2d_act",
    "conv2d_stats",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose2d_act",
    "conv_transpose2d_subpixel",
    "downsample2d",
    "filter2d",
    "instance_norm_act",
    "lstm",
    "lstm_cell",
    "lstm_gates",
    "lstm_recurrence",
    "minibatch_stddev",
    "spectral_norm",
    "upfirdn2d",
    "upsample2d",
]
