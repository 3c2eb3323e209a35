"""The recurrence with resident weights on the emulated launchers, as `fuseblock.launch.resident_recurrence` wants it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from fuseblock.launch.gpu import H200

_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class EmulatedRecurrence:
    """`ResidentKernels` of one tier on CPU tensors.

    Attributes:
        multiprocessors: of the GPU that is emulated; fewer than 8-row tiles make the kernels take 16 rows a block.
        shared_bytes: of shared memory that a block may have there.
        last_launch: () -> (blocks over rows, directions, threads of a block).
        set_seed: (int) order in which the threads of a block take turns, 0: ascending.
        set_device: (limits of runtime/device.h by name) the GPU that launchers run on; default: an H200.
        resident: of tiers whose blocks depend on each other, (w_hh, backward) -> how many of them run at the same time.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.multiprocessors, self.shared_bytes = H200.multiprocessors, H200.shared_bytes
        self.last_launch, self.set_seed = module.last_launch, module.set_seed
        self.set_device = module.set_device
        if hasattr(module, "fwd_resident"):
            self.resident = self._resident

    @property
    def _gpu(self) -> tuple[int, int]:
        return self.multiprocessors, self.shared_bytes

    def fwd(self, gx: Any, *args: Any) -> None:
        self._module.fwd(gx, *args, self._gpu, _DTYPES.index(gx.dtype))

    def bwd(self, *args: Any) -> None:
        self._module.bwd(*args, self._gpu, _DTYPES.index(args[5].dtype))

    def layer_fwd(self, x: Any, *args: Any) -> None:
        self._module.layer_fwd(x, *args, self._gpu, _DTYPES.index(x.dtype))

    def _resident(self, w_hh: Any, backward: bool) -> int:
        ask = self._module.bwd_resident if backward else self._module.fwd_resident
        blocks: int = ask(w_hh.shape[-1], _DTYPES.index(w_hh.dtype))
        return blocks
