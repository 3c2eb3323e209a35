"""The CUDA C++ kernels of batch_norm_act as the driver wants them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._library import KERNEL_DTYPES
from ..dispatch import Candidate
from .batch_norm_act import DRIVERS, Site, folding


def _why_not(*args: Any) -> str | None:
    x = next(a for a in args if isinstance(a, Tensor))
    if x.device.type != "cuda":
        return f"tensors are on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not one of float64, float32, float16, bfloat16"
    return None


def _why_not_without_copies(*args: Any) -> str | None:
    per_sample = args[-1]
    return "channels-last statistics per sample would be copied" if per_sample else _why_not(*args)


def candidates(op: str) -> tuple[Candidate, ...]:
    """How CUDA C++ can run ``op``, a member of the family batch_norm_act."""
    run = folding(partial(DRIVERS[op], CudaKernels(torch.ops.fuseblock_cuda)))
    return (Candidate("cuda", run, _why_not_without_copies, devices=("cuda",)),)


def candidates_with_copies(op: str) -> tuple[Candidate, ...]:
    """As `candidates`, for statistics per sample: after those that copy nothing."""
    return tuple(replace(c, why_not=_why_not, variant="copying") for c in candidates(op))


class CudaKernels:
    """The functions of `batch_norm_act.Kernels` on operators with the names and signatures of torch.ops.fuseblock_cuda."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    @staticmethod
    def _site(site: Site) -> tuple[Any, ...]:
        return (
            site.x, site.mean, site.invstd, site.weight, site.bias, site.residual, site.mask, site.slope,
            site.activation, site.negative_slope,
        )  # fmt: skip

    def stats(self, x: Tensor, per_sample: bool = False) -> Tensor:
        """See `batch_norm_act.Kernels.stats`."""
        assert not per_sample
        result: Tensor = self._raw.batch_norm_act_stats(x)
        return result

    def fwd_apply(self, site: Site, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """See `batch_norm_act.Kernels.fwd_apply`."""
        operands = site.x, site.mean, site.invstd, site.weight, site.bias, site.residual, site.slope
        y, mask = self._raw.batch_norm_act_fwd(*operands, site.activation, site.negative_slope, want_mask)
        return y, mask if want_mask else None

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
