"""The operators ``batch_norm_act`` of the ``cuda`` backend on the emulated launchers: allocation as csrc/torch does it."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fuseblock.launch.batch_norm_act import DRIVERS, folding
from fuseblock.launch.cuda_batch_norm_act import CudaKernels

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PRELU = 3


class EmulatedBatchNormAct:
    """Operators with the names and signatures of ``torch.ops.fuseblock_cuda``; what they allocate starts as NaN.

    Attributes:
        set_seed: (int) order in which the threads of a block take turns, 0: ascending.
        set_workers: (int) how many blocks run at the same time.
        last_launch: [blocks over channels, over positions, threads over channels, over positions].
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.set_seed, self.set_workers = module.set_seed, module.set_workers
        self.last_launch = module.last_launch
        #: What the driver runs on.
        self.kernels = CudaKernels(self)

    def operators(self) -> dict[str, Any]:
        """The operators' implementations, by name."""
        return {op: folding(partial(run, self.kernels)) for op, run in DRIVERS.items()}

    def _run(self, kernel: str, x: Tensor, site: tuple[Any, ...], **tensors: Tensor | None) -> None:
        numbers = self.numbers(x, site)
        names = ("mean", "invstd", "weight", "bias", "residual", "mask", "slope")
        operands = {"x": x, **dict(zip(names, site, strict=False)), **tensors}
        for name, t in operands.items():
            if t is None:
                continue
            if name in ("residual", "dy", "v", "v_residual"):
                same = t.shape == x.shape and t.dtype == x.dtype and t.stride() == x.stride()
                assert same, f"{name} must be like x"
            else:
                assert t.is_contiguous() or t.shape == x.shape, f"{name} must be contiguous"
        self._module.launch(kernel, numbers, operands, DTYPES.index(x.dtype))

    @staticmethod
    def numbers(x: Tensor, site: tuple[Any, ...] = ()) -> dict[str, Any]:
        """Sizes and numbers of a launch."""
        positions = x.numel() // max(x.shape[0] * x.shape[1], 1)
        last = positions == 1 or not x.is_contiguous()
        slope = site[6] if site else None
        return {
            "samples": 1 if last else x.shape[0],
            "channels": x.shape[1],
            "size": x.shape[0] * positions if last else positions,
            "channels_last": last,
            "activation": site[7] if site else 0,
            "negative_slope": site[8] if site else 0.0,
            "slope_stride": int(slope is not None and slope.numel() != 1),
        }

    def _reduce(self, kernel: str, count: int, x: Tensor, site: tuple[Any, ...], **tensors: Any) -> Tensor:
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        if x.numel() == 0:
            return torch.zeros(count, x.shape[1], dtype=state)
        splits = self._module.splits(self.numbers(x, site))
        sums = torch.full((count, x.shape[1]), float("nan"), dtype=state)
        workspace = torch.full((splits * 12 * x.shape[1] if splits > 1 else 0,), float("nan"), dtype=state)
        self._run(kernel, x, site, sums=sums, workspace=workspace, **tensors)
        return sums

    def batch_norm_act_stats(self, x: Tensor) -> Tensor:
        return self._reduce("stats", 2, x, ())

    def batch_norm_act_fwd(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        activation: int,
        negative_slope: float,
        want_mask: bool,
    ) -> tuple[Tensor, Tensor]:
        y = _poisoned(x)
        mask = torch.full(((x.numel() + 7) // 8 if want_mask else 0,), 0xA5, dtype=torch.uint8)
        site = (mean, invstd, weight, bias, residual, None, slope, activation, negative_slope)
        self._run("fwd", x, site, y=y, new_mask=mask if want_mask else None)
        return y, mask

    def batch_norm_act_bwd_reduce(self, dy: Tensor, x: Tensor, *site: Any) -> Tensor:
        return self._reduce("bwd_reduce", 3 if site[7] == PRELU else 2, x, site, dy=dy)

    def batch_norm_act_bwd(self, dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *site, k, want_dresidual = args
        dx, dresidual = _poisoned(x), _poisoned(x) if want_dresidual else None
        self._run("bwd", x, tuple(site), dy=dy, k=k, dx=dx, dresidual=dresidual)
        return dx, x.new_empty(0) if dresidual is None else dresidual

    def batch_norm_act_bwd_bwd_reduce(
        self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, x: Tensor, *site: Any
    ) -> Tensor:
        count = 5 if site[7] < PRELU else 10 if v_residual is None else 12
        return self._reduce("bwd_bwd_reduce", count, x, site, dy=dy, v=v, v_residual=v_residual)

    def batch_norm_act_bwd_bwd(
        self, v: Tensor | None, v_residual: Tensor | None, dy: Tensor, x: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *site, k = args
        a_x, a_dy, a_residual = _poisoned(x), _poisoned(x), _poisoned(x) if site[4] is not None else None
        outputs = {"a_x": a_x, "a_dy": a_dy, "a_residual": a_residual}
        self._run("bwd_bwd", x, tuple(site), v=v, v_residual=v_residual, dy=dy, k=k, **outputs)
        return a_x, a_dy, x.new_empty(0) if a_residual is None else a_residual


def _poisoned(x: Tensor) -> Tensor:
    return torch.empty_like(x).fill_(float("nan"))
