"""Drop-in modules: each subclasses the `torch.nn` module that it replaces and shares its parameters'
names.
"""

from .activation import LeakyReLU, ReLU
from .blocks import Conv1dBlock, Conv2dBlock, ConvTranspose1dBlock, ConvTranspose2dBlock, ResidualBlock2d
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .folding import fold_batch_norm
from .lstm import LSTM
from .lstm_cell import LSTMCell
from .norm_act import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BiasAct2d,
    InstanceNormAct1d,
    InstanceNormAct2d,
)
from .sequential import Sequential
from .spectral_norm import remove_spectral_norm, spectral_norm

__all__ = [
    "LSTM",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BiasAct2d",
    "Conv1d",
    "Conv1dBlock",
    "Conv2d",
    "Conv2dBlock",
    "ConvTranspose1d",
    "ConvTranspose1dBlock",
    "ConvTranspose2d",
    "ConvTranspose2dBlock",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "LSTMCell",
    "LeakyReLU",
    "ReLU",
    "ResidualBlock2d",
    "Sequential",
    "fold_batch_norm",
    "remove_spectral_norm",
    "spectral_norm",
]
