"""The Triton and CUDA kernels of batch_norm_act, one by one, against plain formulas in float64.

Triton runs in the hardened interpreter and CUDA in the emulator, or both on a GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fuseblock._activations import NAMES

from ..backends import DEVICE
from .batch_norm_act_formulas import Case, check_all

_ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Every activation in both layouts; what is saved of the residual, odd rows (35, 5), whole bytes (24, 16) in turn.
CASES = [
    *(Case((2, 3, 7, 5), last, activation) for activation in NAMES for last in (False, True)),
    *(Case((3, 5, 7, 5), last, "relu", saved="mask") for last in (False, True)),
    *(Case((3, 16, 24), last, "leaky_relu", saved="mask") for last in (False, True)),
    *(Case((3, 5, 7), last, "relu", saved="residual") for last in (False, True)),
    *(Case((3, 16, 24), last, "leaky_relu", saved="residual") for last in (False, True)),
    *(Case((2, 16, 4, 4), last, activation, saved="residual") for activation in ("silu", "prelu") for last in (False, True)),
    Case((9, 5), True, "prelu", one_slope=True),
    Case((9, 16), True, "relu", affine=False, saved="residual"),
    Case((2, 3, 2, 2, 3), True, "elu", affine=False),
    Case((1, 1, 1, 1), False, "tanh"),
    Case((4, 1, 1), False, "relu", saved="residual"),
    *(
        Case((2, 16, 4, 12), last, activation, dtype, saved=saved)
        for dtype in DTYPES[1:]
        for last, activation, saved in [
            (False, "leaky_relu", "residual"),
            (True, "leaky_relu", "mask"),
            (False, "silu", "residual"),
            (True, "prelu", None),
            (True, "tanh", None),
            (False, "elu", None),
        ]
    ),
    Case((2, 16, 4, 4), False, "silu", torch.bfloat16, saved="residual", offset=1),
    Case((2, 16, 4, 4), True, "relu", torch.float32, saved="residual", offset=3),
    Case((2, 16, 4, 4), True, "relu", torch.float32, saved="mask", offset=2),
]  # fmt: skip


def triton_kernels() -> Any:
    """The launchers' module, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        from ..triton_interpreter import install

        install()
    from fuseblock.launch import triton_batch_norm_act

    return triton_batch_norm_act


def cuda_kernels() -> Any:
    """The compiled kernels, in the emulator where there is no GPU."""
    from fuseblock.launch.cuda_batch_norm_act import CudaKernels

    if DEVICE == "cuda":
        return CudaKernels(torch.ops.fuseblock_cuda)
    from ..emulator import load

    return load().norm.kernels


@pytest.fixture(params=[pytest.param(name, marks=_ON_GPU) for name in ("triton", "cuda")])
def kernels(request: pytest.FixtureRequest) -> Any:
    return triton_kernels() if request.param == "triton" else cuda_kernels()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(kernels: Any, case: Case) -> None:
    check_all(kernels, case, DEVICE)
