"""What a tier of the recurrence has to know of a GPU to say how large a layer it can hold.

Every tier's launch module has ``largest_hidden(dtype, gpu) -> int``: the largest H that it runs there, 0 for not at all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """The limits of a GPU.

    Attributes:
        name: what people call it, or the driver's name of a present device.
        capability: compute capability, major and minor.
        multiprocessors: streaming multiprocessors that a kernel can use (of a MIG slice: the slice's).
        shared_bytes: the most shared memory, in bytes, that a block can opt in to.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can form clusters and read each other's shared memory."""
        return self.capability >= (9, 0)


#: GPUs whose limits are known without one being there; of two of a name, the form factors differ.
H200 = Gpu("H200", (9, 0), 132, 232_448)
H100_SXM = Gpu("H100 SXM", (9, 0), 132, 232_448)
H100_PCIE = Gpu("H100 PCIe", (9, 0), 114, 232_448)
A100 = Gpu("A100", (8, 0), 108, 166_912)
RTX_A4000 = Gpu("RTX A4000", (8, 6), 48, 101_376)
KNOWN = (H200, H100_SXM, H100_PCIE, A100, RTX_A4000)


def present(device: int | None = None) -> Gpu | None:
    """The GPU of this machine (default: PyTorch's current one), or None where there is none."""
    if not torch.cuda.is_available():
        return None
    # The stubs do not know of the opt-in limit.
    properties: Any = torch.cuda.get_device_properties(
        torch.cuda.current_device() if device is None else device
    )
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


_present = functools.cache(present)


def gpu_of(x: Tensor) -> Gpu:
    """The GPU that x is on; an H200 for CPU tensors, which emulated kernels take, and where that GPU is not here."""
    return (_present(x.device.index) if x.device.type == "cuda" else None) or H200
