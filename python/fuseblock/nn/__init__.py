"""Drop-in modules: each subclasses the `torch.nn` module that it replaces and shares its parameters'
names.
"""

from .lstm import LSTM
from .lstm_cell import LSTMCell

__all__ = ["LSTM", "LSTMCell"]
