"""Resampling of images with FIR filters: `upfirdn2d` and what is built on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, ops
from ..reference import upfirdn2d_reference

__all__ = ["downsample2d", "filter2d", "upfirdn2d", "upsample2d"]

#: A separable filter runs as one two-dimensional pass up to so many products per sample; beyond, one pass per dimension
#: is cheaper in spite of the intermediate image.
_ONE_PASS_TAPS = 36


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else _sequence(value, name, (2,))
    return x, y


def _padding(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(x before, x after, y before, y after)."""
    if isinstance(value, int):
        return value, value, value, value
    values = _sequence(value, "padding", (2, 4))
    if len(values) == 2:
        x, y = values
        return x, x, y, y
    x0, x1, y0, y1 = values
    return x0, x1, y0, y1


def _sequence(value: Sequence[int], name: str, lengths: tuple[int, ...]) -> list[int]:
    values = list(value)
    if len(values) not in lengths:
        raise ValueError(
            f"upfirdn2d: expected {name} as 1 or {' or '.join(map(str, lengths))} numbers, got {value}"
        )
    return values


def _taps(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter."""
    if f is None:
        return 1, 1
    if f.dim() not in (1, 2):
        raise ValueError(f"upfirdn2d: expected a filter of shape (taps,) or (fh, fw), got {tuple(f.shape)}")
    return f.shape[-1], f.shape[0]


def _run(
    x: Tensor,
    f: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    args = (x, f, *up, *down, *padding, flip_filter, gain)
    if dispatch.plain_pytorch():
        ops.check_upfirdn2d(*args)
        return upfirdn2d_reference(*args)
    y: Tensor = ops.upfirdn2d(*args)
    return y


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample images by zero insertion, pad them, filter them and keep every ``down``-th sample.

        u[i up_y, j up_x] = x[i, j], zero elsewhere, of shape (H up_y, W up_x); then padded or cropped
        y[i, j] = gain sum_{k, l} f'[k, l] u[i down_y + k, j down_x + l]

    with f' = f turned by 180 degrees (a convolution), or f itself with ``flip_filter`` (a correlation). The semantics are
    those of ``upfirdn2d`` in NVlabs' StyleGAN repositories.

    Args:
        x: images (N, C, H, W), float64, float32, float16 or bfloat16; contiguous or channels-last without a copy.
        f: filter (fh, fw), or (taps,) for the separable filter f f^T, or None for no filter. It is used in float32
            (float64 for float64 images) and has no gradient.
        up, down: factors, one number or (x, y).
        padding: of the upsampled image, one number, (x, y), or (x before, x after, y before, y after). Negative: crop.
        flip_filter: correlate with f instead of convolving with it.
        gain: factor of the result.

    Returns:
        (N, C, (H up_y + pad_y0 + pad_y1 - fh) // down_y + 1, (W up_x + pad_x0 + pad_x1 - fw) // down_x + 1), in the dtype
        and the memory format of x. Sums are taken in float32 (float64 for float64); a long separable filter takes two
        passes, whose intermediate image has the dtype of x. Differentiable in x any number of times.

    Raises:
        ValueError: shapes, factors or devices do not fit, or f requires a gradient. TypeError: not floating point.
        fuseblock.BackendError: the forced backend cannot run these tensors.
    """
    taps_x, taps_y = _taps(f)
    (up_x, up_y), (down_x, down_y) = ups, downs = _pair(up, "up"), _pair(down, "down")
    x0, x1, y0, y1 = pads = _padding(padding)
    if f is None:
        return _run(x, x.new_ones(1, 1), ups, downs, pads, flip_filter, gain)
    if f.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "upfirdn2d: the filter requires a gradient, which is not implemented: pass f.detach()"
        )
    if f.dim() == 2:
        return _run(x, f, ups, downs, pads, flip_filter, gain)
    if up_x > 0 and up_y > 0 and -(-taps_x // up_x) * -(-taps_y // up_y) <= _ONE_PASS_TAPS:
        return _run(x, torch.outer(f, f), ups, downs, pads, flip_filter, gain)
    x = _run(x, f[None, :], (up_x, 1), (down_x, 1), (x0, x1, 0, 0), flip_filter, gain)
    return _run(x, f[:, None], (1, up_y), (1, down_y), (0, 0, y0, y1), flip_filter, 1.0)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Filter images (N, C, H, W); zero padding keeps their size, and ``padding`` adds to it.

    Arguments, result and errors as in `upfirdn2d`.
    """
    taps_x, taps_y = _taps(f)
    x0, x1, y0, y1 = _padding(padding)
    pads = (x0 + taps_x // 2, x1 + (taps_x - 1) // 2, y0 + taps_y // 2, y1 + (taps_y - 1) // 2)
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample images (N, C, H, W) to (N, C, H up_y, W up_x); ``padding`` of the result adds to that.

    The gain is multiplied by up_x up_y, so that a filter whose sum is 1 keeps the brightness. Arguments, result and errors
    as in `upfirdn2d`.
    """
    up_x, up_y = _pair(up, "up")
    taps_x, taps_y = _taps(f)
    x0, x1, y0, y1 = _padding(padding)
    pads = (
        x0 + (taps_x + up_x - 1) // 2,
        x1 + (taps_x - up_x) // 2,
        y0 + (taps_y + up_y - 1) // 2,
        y1 + (taps_y - up_y) // 2,
    )
    return upfirdn2d(x, f, (up_x, up_y), 1, pads, flip_filter, gain * up_x * up_y)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Downsample images (N, C, H, W) to (N, C, H // down_y, W // down_x); ``padding`` of the input adds to that.

    Arguments, result and errors as in `upfirdn2d`.
    """
    down_x, down_y = _pair(down, "down")
    taps_x, taps_y = _taps(f)
    x0, x1, y0, y1 = _padding(padding)
    pads = (
        x0 + (taps_x - down_x + 1) // 2,
        x1 + (taps_x - down_x) // 2,
        y0 + (taps_y - down_y + 1) // 2,
        y1 + (taps_y - down_y) // 2,
    )
    return upfirdn2d(x, f, 1, (down_x, down_y), pads, flip_filter, gain)
