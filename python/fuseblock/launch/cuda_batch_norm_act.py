"""The CUDA C++ kernels of batch_norm_act: as wholes where no process group comes between, else as the driver wants them.

Forward and backward as wholes take one launch where a channel fits into the shared memory of a block, or of the blocks of a
cluster (sm_90 and newer): x, and in backward dy, are then read once. That holds, in 16 bit with rows of whole vectors
(8 elements), on an H100 or H200 (227 KB a block, clusters of 8; of an A100, one block of 163 KB):

    contiguous     forward: 917,504 values of a channel (A100: 81,920); backward: half as many
    channels-last  forward: 27,136 positions (A100: 2,368), of 32 channels at a time at least; backward: half as many

and half of that in float32.
Other shapes, float64, rows that are not aligned, and clusters that the driver refuses (under MIG or MPS there may be no room
for one): a launch for the statistics, one that combines the blocks' shares, and one that applies.
``csrc/cuda/batch_norm_act_resident.cu`` decides, by sizes and the device's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._activations import number
from .._library import KERNEL_DTYPES
from ..dispatch import Candidate
from .batch_norm_act import (
    DRIVERS,
    Site,
    backward_site,
    dense,
    dense_like,
    gradients_of_channels,
    is_masked,
    number_of_channels,
    wide,
)


def _why_not(*args: Any) -> str | None:
    x = next(a for a in args if isinstance(a, Tensor))
    if x.device.type != "cuda":
        return f"tensors are on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not one of float64, float32, float16, bfloat16"
    return None


def candidates(op: str) -> tuple[Candidate, ...]:
    """How CUDA C++ can run ``op``, a member of the family batch_norm_act."""
    run = partial(RUN[op], CudaKernels(torch.ops.fuseblock_cuda))
    return (Candidate("cuda", run, _why_not, devices=("cuda",)),)


class CudaKernels:
    """The functions of `batch_norm_act.Kernels` on operators with the names and signatures of torch.ops.fuseblock_cuda."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    @staticmethod
    def _site(site: Site) -> tuple[Any, ...]:
        return (
            site.x, site.mean, site.invstd, site.weight, site.bias, site.residual, site.mask, site.slope,
            site.activation, site.negative_slope, site.per_sample,
        )  # fmt: skip

    def stats(self, x: Tensor, per_sample: bool = False) -> Tensor:
        """See `batch_norm_act.Kernels.stats`."""
        result: Tensor = self._raw.batch_norm_act_stats(x, per_sample)
        return result

    def fwd_apply(self, site: Site, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """See `batch_norm_act.Kernels.fwd_apply`."""
        operands = site.x, site.mean, site.invstd, site.weight, site.bias, site.residual, site.slope
        options = site.activation, site.negative_slope, site.per_sample
        y, mask = self._raw.batch_norm_act_fwd(*operands, *options, want_mask)
        return y, mask if want_mask else None

    def whole_fwd(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        eps: float,
        activation: int,
        negative_slope: float,
        per_sample: bool,
        want_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y, mean, var, invstd, mask) with the statistics of x itself; arguments as in `batch_norm_act.Site`."""
        affine = weight, bias, residual, slope
        options = eps, activation, negative_slope, per_sample, want_mask
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        result = self._raw.batch_norm_act_whole_fwd(x, *affine, *options)
        return result

    def whole_bwd(self, dy: Tensor, site: Site, want_dresidual: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dresidual, sums of `bwd_reduce`), with dx through the statistics."""
        result: tuple[Tensor, Tensor, Tensor]
        result = self._raw.batch_norm_act_whole_bwd(dy, *self._site(site), want_dresidual)
        return result

    def bwd_reduce(self, dy: Tensor, site: Site) -> Tensor:
        """See `batch_norm_act.Kernels.bwd_reduce`."""
        result: Tensor = self._raw.batch_norm_act_bwd_reduce(dy, *self._site(site))
        return result

    def bwd_apply(
        self, dy: Tensor, site: Site, k: Tensor, want_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `batch_norm_act.Kernels.bwd_apply`."""
        dx, dresidual = self._raw.batch_norm_act_bwd(dy, *self._site(site), k, want_dresidual)
        return dx, dresidual if want_dresidual else None

    def bwd_bwd_reduce(self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site) -> Tensor:
        """See `batch_norm_act.Kernels.bwd_bwd_reduce`."""
        result: Tensor = self._raw.batch_norm_act_bwd_bwd_reduce(v, v_residual, dy, *self._site(site))
        return result

    def bwd_bwd_apply(
        self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, site: Site, k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `batch_norm_act.Kernels.bwd_bwd_apply`."""
        a_x, a_dy, a_residual = self._raw.batch_norm_act_bwd_bwd(v, v_residual, dy, *self._site(site), k)
        return a_x, a_dy, None if site.residual is None else a_residual


def forward(
    kernels: CudaKernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    training: bool,
    group: str,
    save: bool,
    per_sample: bool = False,
) -> Any:
    """``batch_norm_act``; see ``ops/batch_norm_act.py``."""
    if mean is not None or group or x.numel() == 0:
        given = weight, bias, residual, slope, mean, var
        more = training, group, save, per_sample
        return DRIVERS["batch_norm_act"](kernels, x, *given, eps, activation, negative_slope, *more)
    x = dense(x)
    affine = wide(weight, x), wide(bias, x), dense_like(residual, x), wide(slope, x)
    want_mask = save and residual is not None and is_masked(activation)
    act = number(activation)
    whole = kernels.whole_fwd(x, *affine, eps, act, negative_slope, per_sample, want_mask)
    y, mean, var, invstd, mask = whole
    count = mean.new_full((), x.numel() // number_of_channels(x, per_sample))
    return y, mean, var, invstd, count, mask


def backward(
    kernels: CudaKernels,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    training: bool,
    group: str,
    eps: float,
    want_dx: bool,
    want_sums: bool,
    want_dresidual: bool,
    per_sample: bool = False,
) -> Any:
    """``batch_norm_act_bwd``; see ``ops/batch_norm_act.py``."""
    affine = weight, bias, residual, slope
    if group or not (training and want_dx) or x.numel() == 0:
        options = (
            activation,
            negative_slope,
            training,
            group,
            eps,
            want_dx,
            want_sums,
            want_dresidual,
            per_sample,
        )
        return DRIVERS["batch_norm_act_bwd"](kernels, dy, x, *affine, mean, invstd, count, mask, *options)
    dy, site = backward_site(dy, x, *affine, mean, invstd, mask, activation, negative_slope, per_sample)
    dx, dresidual, sums = kernels.whole_bwd(dy, site, want_dresidual)
    return dx, *gradients_of_channels(sums if want_sums else None, mean, weight, bias, slope), dresidual


#: The operators' implementations on the functions of `CudaKernels`.
RUN: dict[str, Callable[..., Any]] = DRIVERS | {"batch_norm_act": forward, "batch_norm_act_bwd": backward}
