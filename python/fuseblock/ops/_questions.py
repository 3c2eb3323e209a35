"""What tables of measurements are asked about the operators of the GAN blocks, see `_tables`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tables, dispatch
from .bias_act import is_channels_last

Args = Sequence[Any]


def _of(x: Tensor) -> _tables.Key:
    """Kinds and sizes of x (N, C, ...)."""
    return (
        ("dtype", x.dtype),
        ("layout", "channels-last" if is_channels_last(x) else "contiguous"),
        ("batch", x.shape[0]),
        ("channels", x.shape[1]),
        ("positions", x.shape[2:].numel()),
    )


def _norm(args: Args) -> _tables.Key:
    x, _, _, residual, _, mean, *_ = args
    kinds = ("residual", residual is not None), ("statistics", "given" if mean is not None else "taken")
    return *_of(x), *kinds, ("training", args[10]), ("per_sample", args[13])


def _norm_bwd(args: Args) -> _tables.Key:
    kinds = ("residual", args[17]), ("dx", args[15]), ("sums", args[16])
    return *_of(args[1]), *kinds, ("training", args[12]), ("per_sample", args[18])


def _norm_bwd_bwd(args: Args) -> _tables.Key:
    kinds = ("residual", args[4] is not None), ("training", args[17])
    return *_of(args[6]), *kinds, ("per_sample", args[20])


def _bias(args: Args) -> _tables.Key:
    return *_of(args[0]), ("save", args[7])


def _bias_bwd(args: Args) -> _tables.Key:
    dy, x, _, _, _, *_, need_dbias = args
    return *_of(dy), ("from", "bits" if x is None else "x"), ("dbias", need_dbias)


def _filter(args: Args) -> _tables.Key:
    x, f, up_x, up_y, down_x, down_y, *_ = args
    factors = ("up", f"{up_x}x{up_y}"), ("down", f"{down_x}x{down_y}")
    return *_of(x), ("taps", f"{f.shape[1]}x{f.shape[0]}"), *factors


def of_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], groups: int, transposed: bool, dtype: torch.dtype
) -> _tables.Key:
    """Kinds and sizes of a convolution that computes in dtype."""
    channels, out_channels = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0] // groups)
    return (
        ("dtype", dtype),
        ("tf32", _tables.tf32("conv") if dtype is torch.float32 else ""),
        ("layout", "channels-last" if is_channels_last(x) else "contiguous"),
        ("kind", "transposed" if transposed else "plain"),
        ("kernel", "x".join(map(str, weight.shape[2:]))),
        ("stride", "x".join(map(str, stride))),
        ("channels", channels),
        ("out_channels", out_channels),
        ("groups", groups),
        ("batch", x.shape[0]),
        ("height", x.shape[2]),
        ("width", x.shape[3]),
    )


def _conv2d_stats(args: Args) -> _tables.Key:
    x, weight, _, stride_y, stride_x, _, _, scale, *_ = args
    key = of_convolution(x, weight, (stride_y, stride_x), 1, False, x.dtype)
    return *key, ("prologue", scale is not None)


def _conv_transpose2d(args: Args) -> _tables.Key:
    x, weight, _, scale, *_ = args
    return *of_convolution(x, weight, (2, 2), 1, True, x.dtype), ("prologue", scale is not None)


def _conv2d_act(args: Args) -> _tables.Key:
    x, weight, _, stride_y, stride_x, _, _, groups, transposed, *_ = args
    return of_convolution(x, weight, (stride_y, stride_x), groups, transposed, x.dtype)


#: By operator the position of the tensor whose device counts, and the key.
_ASKED: dict[str, tuple[int, Callable[[Args], _tables.Key]]] = {
    "batch_norm_act": (0, _norm),
    "batch_norm_act_bwd": (1, _norm_bwd),
    "batch_norm_act_bwd_bwd": (6, _norm_bwd_bwd),
    "bias_act": (0, _bias),
    "bias_act_bwd": (0, _bias_bwd),
    "upfirdn2d": (0, _filter),
    "conv2d_act": (0, _conv2d_act),
    "conv2d_stats": (0, _conv2d_stats),
    "conv_transpose2d_subpixel": (0, _conv_transpose2d),
}
for _op, (_like, _key) in _ASKED.items():
    dispatch.measured(_op, dispatch.Question(_like, _key))
