"""The operators ``bias_act`` of the ``cuda`` backend on the emulated launchers: allocation as csrc/torch does it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fuseblock.reference.bias_act import keeps_x, planes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class EmulatedBiasAct:
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

    def operators(self) -> dict[str, Any]:
        """The operators' implementations, by name."""
        names = ("bias_act", "bias_act_bwd", "bias_act_bwd_bwd")
        return {name: getattr(self, name) for name in names}

    def _launch(
        self, kernel: str, like: Tensor, constants: tuple[Any, ...], **tensors: Tensor | None
    ) -> None:
        for name, t in tensors.items():
            if t is not None and t.shape == like.shape and like.dim() > 1:
                assert t.dtype == like.dtype and t.is_contiguous() == like.is_contiguous(), (
                    f"{name} must be like the others"
                )
        names = ("activation", "negative_slope", "gain", "clamp")
        numbers = self.sizes(like) | dict(zip(names, constants, strict=True))
        wanted = [name for name in ("sums", "slope_sums") if tensors.get(name) is not None]
        if wanted:
            rows = self._module.splits(numbers) * (2 if keeps_x(numbers["activation"]) else 1)
            partials = torch.full((rows, like.shape[1]), float("nan"), dtype=tensors[wanted[0]].dtype)
            tensors["partials"] = partials
        self._module.launch(kernel, numbers, tensors, DTYPES.index(like.dtype))

    @staticmethod
    def sizes(x: Tensor) -> dict[str, Any]:
        """Sizes and layout of a launch."""
        samples, channels = x.shape[:2]
        positions = x.numel() // max(samples * channels, 1)
        last = positions <= 1 or not x.is_contiguous()
        folded = (
            {"samples": 1, "size": samples * positions} if last else {"samples": samples, "size": positions}
        )
        return {"channels": channels, "channels_last": last, **folded}

    def bias_act(
        self, x: Tensor, bias: Tensor | None, slope: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor]:
        *constants, save = args
        y = _poisoned(x)
        count = planes(constants[0], constants[3]) if save else 0
        mask = torch.full((count * ((x.numel() + 7) // 8),), 0xA5, dtype=torch.uint8)
        self._launch("fwd", x, tuple(constants), x=x, bias=bias, slope=slope, out=y, new_mask=mask)
        return y, mask

    def bias_act_bwd(
        self,
        dy: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | None,
        mask: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *constants, need_dbias = args
        dx, dbias, dslope = _poisoned(dy), _sums(dy, need_dbias), _sums(dy, slope is not None)
        self._launch(
            "bwd", dy, tuple(constants), dy=dy, x=x, bias=bias, slope=slope, mask=mask, out=dx,
            sums=dbias if need_dbias else None, slope_sums=None if slope is None else dslope,
        )  # fmt: skip
        return dx, dbias, dslope

    def bias_act_bwd_bwd(
        self,
        v: Tensor,
        v_bias: Tensor | None,
        v_slope: Tensor | None,
        dy: Tensor | None,
        x: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | None,
        mask: Tensor | None,
        *constants: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept = x is not None
        a_dy, a_x = _poisoned(v), _poisoned(v) if kept else _sums(v, False)
        a_bias, a_slope = _sums(v, kept), _sums(v, slope is not None)
        self._launch(
            "bwd_bwd", v, constants, v=v, v_bias=v_bias, v_slope=None if slope is None else v_slope, dy=dy, x=x,
            bias=bias, slope=slope, mask=mask, out=a_dy, a_x=a_x if kept else None, sums=a_bias if kept else None,
            slope_sums=None if slope is None else a_slope,
        )  # fmt: skip
        return a_dy, a_x, a_bias, a_slope


def _poisoned(x: Tensor) -> Tensor:
    return torch.empty_like(x).fill_(float("nan"))


def _sums(x: Tensor, wanted: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = float("nan") if x.numel() else 0.0
    return torch.full((x.shape[1] if wanted else 0,), value, dtype=dtype)
