"""The operators ``batch_norm_act`` of the ``cuda`` backend on the emulated launchers: allocation as csrc/torch does it."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fuseblock.launch.batch_norm_act import number_of_channels
from fuseblock.launch.cuda_batch_norm_act import RUN, CudaKernels

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PRELU = 3


class EmulatedBatchNormAct:
    """Operators with the names and signatures of ``torch.ops.fuseblock_cuda``; what they allocate starts as NaN.

    Attributes:
        set_seed: (int) order in which the threads of a block take turns, 0: ascending.
        set_workers: (int) how many blocks run at the same time.
        last_launch: [blocks over channels, over positions, threads over channels, over positions].
        set_device: (clusters, shared_bytes, largest_cluster) limits of the GPU that channels are to fit on; default:
            an H200.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.set_seed, self.set_workers = module.set_seed, module.set_workers
        self.last_launch, self.set_device = module.last_launch, module.set_device
        #: What the driver runs on.
        self.kernels = CudaKernels(self)

    def operators(self) -> dict[str, Any]:
        """The operators' implementations, by name."""
        return {op: partial(run, self.kernels) for op, run in RUN.items()}

    def _run(
        self, kernel: str, x: Tensor, site: tuple[Any, ...], eps: float = 0.0, **tensors: Tensor | None
    ) -> None:
        numbers = self.numbers(x, site, eps)
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
    def numbers(x: Tensor, site: tuple[Any, ...] = (), eps: float = 0.0) -> dict[str, Any]:
        """Sizes and numbers of a launch."""
        *_, slope, activation, negative_slope, per_sample = site or (None, 0, 0.0, False)
        samples, channels = x.shape[:2]
        positions = x.numel() // max(samples * channels, 1)
        last = (positions == 1 and not per_sample) or not x.is_contiguous()
        folded = per_sample != last
        return {
            "samples": 1 if folded else samples,
            "channels": samples * channels if per_sample and folded else channels,
            "size": samples * positions if last and folded else positions,
            "channels_last": last,
            "activation": activation,
            "negative_slope": negative_slope,
            "slope_stride": int(slope is not None and slope.numel() != 1),
            "eps": eps,
        }

    def _per_channel(self, rows: int, x: Tensor, per_sample: bool) -> Tensor:
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.full((rows, number_of_channels(x, per_sample)), float("nan"), dtype=state)

    def _workspace(self, x: Tensor, site: tuple[Any, ...]) -> Tensor:
        splits = self._module.splits(self.numbers(x, site))
        return self._per_channel(splits * 12 if splits > 1 else 0, x, site[-1])

    def _reduce(self, kernel: str, count: int, x: Tensor, site: tuple[Any, ...], **tensors: Any) -> Tensor:
        sums = self._per_channel(count, x, site[-1])
        if x.numel() == 0:
            return sums.zero_()
        self._run(kernel, x, site, sums=sums, workspace=self._workspace(x, site), **tensors)
        return sums

    def batch_norm_act_stats(self, x: Tensor, per_sample: bool) -> Tensor:
        return self._reduce("stats", 2, x, (*(None,) * 7, 0, 0.0, per_sample))

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
        per_sample: bool,
        want_mask: bool,
    ) -> tuple[Tensor, Tensor]:
        y, mask = _poisoned(x), _new_mask(x, want_mask)
        site = mean, invstd, weight, bias, residual, None, slope, activation, negative_slope, per_sample
        self._run("fwd", x, site, y=y, new_mask=mask if want_mask else None)
        return y, mask

    def batch_norm_act_whole_fwd(
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
    ) -> tuple[Tensor, ...]:
        y, mask = _poisoned(x), _new_mask(x, want_mask)
        statistics = [self._per_channel(1, x, per_sample)[0] for _ in range(3)]
        names = "new_mean", "new_var", "new_invstd"
        site = None, None, weight, bias, residual, None, slope, activation, negative_slope, per_sample
        outputs = {"y": y, "new_mask": mask if want_mask else None, "workspace": self._workspace(x, site)}
        self._run("whole_fwd", x, site, eps, **outputs, **dict(zip(names, statistics, strict=True)))
        return y, *statistics, mask

    def batch_norm_act_whole_bwd(self, dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *rest, want_dresidual = args
        site = tuple(rest)
        dx, dresidual = _poisoned(x), _poisoned(x) if want_dresidual else None
        sums, k = (self._per_channel(n, x, site[-1]) for n in (3 if site[7] == PRELU else 2, 3))
        outputs = {"dx": dx, "dresidual": dresidual, "sums": sums, "new_k": k}
        self._run("whole_bwd", x, site, dy=dy, workspace=self._workspace(x, site), **outputs)
        return dx, x.new_empty(0) if dresidual is None else dresidual, sums

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


def _new_mask(x: Tensor, is_wanted: bool) -> Tensor:
    return torch.full(((x.numel() + 7) // 8 if is_wanted else 0,), 0xA5, dtype=torch.uint8)


def _poisoned(x: Tensor) -> Tensor:
    return torch.empty_like(x).fill_(float("nan"))
