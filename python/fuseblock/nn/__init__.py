"""Drop-in modules: each subclasses the `torch.nn` module that it replaces and shares its parameters'
names.
"""

from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .lstm import LSTM
from .lstm_cell import LSTMCell

__all__ = [
    "LSTM",
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "LSTMCell",
]
