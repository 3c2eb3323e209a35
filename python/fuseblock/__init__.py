"""fuseblock: fused, twice differentiable kernels for PyTorch LSTMs and GAN blocks.

`fuseblock.nn` has drop-in modules, `fuseblock.functional` the functions behind them, `fuseblock.fuse` swaps the modules
of an existing model in place. `fuseblock.gan` has adversarial losses, gradient penalties, averaged weights and models.
`fuseblock.graphed` captures a training step into a CUDA graph. `fuseblock.explain` tells who would run a call and why.
"""

from . import functional, gan, nn
from .compile import enable_compile
from .dispatch import BackendError, backend
from .explain import explain
from .fuse import fuse, unfuse
from .graphed import graphed

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "enable_compile",
    "explain",
    "functional",
    "fuse",
    "gan",
    "graphed",
    "nn",
    "unfuse",
]
