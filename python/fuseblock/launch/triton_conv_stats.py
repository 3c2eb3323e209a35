"""Host side of the Triton convolutions: kernels/conv2d_stats.py, kernels/conv_transpose2d_subpixel.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fuseblock.kernels.conv2d_stats import combine_stats_kernel, conv2d_stats_fwd_kernel
from fuseblock.kernels.conv_transpose2d_subpixel import conv_transpose2d_subpixel_fwd_kernel

from .._activations import number
from .._library import state_dtype
from ..dispatch import Candidate
from ..reference.conv_stats import memory_format_of
from . import _triton, triton_batch_norm_act
from .batch_norm_act import Site, first_order_coefficients, gradients_of_channels, wide

#: Taps that are unrolled at most.
_MOST_TAPS = 25
#: Channels of input and output from which on there is a choice between tiles.
_TALL_CHANNELS = 64
#: Products of a step when a row of taps is one.
_ROW_PRODUCTS = 32

#: Values that a tile of the combining kernel holds, of rows x channels.
COMBINE_BLOCKS = (64, 16)


@dataclass(frozen=True)
class Blocks:
    """Tile sizes (pixels, output channels, channels) and compiler options; none that is listed here spills registers."""

    m: int
    n: int
    k: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def options(self) -> dict[str, int]:
        """Compiler options: more than 4 warps are no safe choice for loops like these (pytorch/pytorch#173068).

        Without a limit ptxas saves registers for further blocks, at the price of a few spills.
        """
        return {"num_warps": 4, "num_stages": self.num_stages, "maxnreg": 255}


def gpu_blocks(
    dtype: torch.dtype,
    precision: str,
    accumulators: int,
    channels: int,
    out_channels: int,
    is_strided_prologue: bool = False,
    is_tall: bool = False,
) -> Blocks:
    """Tiles for a GPU: tensor cores take 16-bit and TF32 products; others are smaller for want of registers.

    ``channels`` are those of one step, ``out_channels`` those of a group: of few of them, tiles have more pixels. A prologue
    that reads channels with strides, each by an address of its own, takes fewer at a time, and none ahead. Tall tiles have
    twice the pixels.
    """
    if dtype == torch.float64:
        m, n, k, stages = 32 // accumulators, 32 // accumulators, 16, 1
    elif dtype == torch.float32 and precision == "ieee":
        m, n, k, stages = 32, 32 // accumulators, 16, 2 if accumulators == 1 else 1
    elif dtype == torch.float32:
        m, n, k, stages = 64, 64 // accumulators, 32 // accumulators, 2
    else:
        m, n, k, stages = 64, 64 // accumulators, 32, 3
    if is_strided_prologue:
        k, stages = 16, 1
    narrow = min(n, _at_least_16(out_channels))
    most = 256 if dtype.itemsize == 2 else 128  # pixels
    return Blocks(
        min((2 if is_tall else 1) * m * n // narrow, most), narrow, min(k, _at_least_16(channels)), stages
    )


def _at_least_16(size: int) -> int:
    """The least length of a tile that holds `size`: products have no shorter ones."""
    return max(int(triton.next_power_of_2(size)), 16)


def steps_by_row(channels: int, taps_x: int) -> bool:
    """Whether a row of taps is one step, because the channels of one tap would leave most of it empty."""
    return channels < 16 and channels * taps_x <= _ROW_PRODUCTS


def tiles(is_backward: bool, layout: torch.memory_format) -> int:
    """For how many accumulators `conv2d_stats_fwd_kernel` needs registers: contiguous input of a norm is a second one."""
    return 2 if is_backward and layout == torch.contiguous_format else 1


def _blocks(
    x: Tensor,
    pixels: int,
    channels: int,
    out_channels: int,
    precision: str,
    accumulators: int,
    around: Neighbours,
) -> Blocks:
    if not _triton.INTERPRETED:
        strided = around.scale is not None and x.is_contiguous()
        return gpu_blocks(x.dtype, precision, accumulators, channels, out_channels, strided, around.is_tall)
    # The interpreter's time is that of the number of programs.
    m, n, k = (min(_at_least_16(size), 4096) for size in (pixels, out_channels, channels))
    return Blocks(m, n, k, 1)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products are taken: as PyTorch's convolutions do."""
    return _triton.precision(dtype, "conv")


def why_not(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    """The reason why these kernels cannot take the arguments of an operator, or None."""
    reason = _triton.why_not_chosen(x)
    if reason is None and weight.shape[2] * weight.shape[3] > _MOST_TAPS:
        reason = f"a kernel of {weight.shape[2]} x {weight.shape[3]} has more than {_MOST_TAPS} taps"
    n, channels, h, w = x.shape
    most = 4 * (h + 2 * weight.shape[2]) * (w + 2 * weight.shape[3])  # padding below the kernel's size
    if reason is None and max(n, channels, *weight.shape[:2]) * most >= 2**31:
        reason = "an image, or the pixels of all of them, have 2^31 elements or more"
    return reason


def why_not_tall(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    """The reason why kernels with tall tiles cannot take the arguments of an operator, or None."""
    if x.dtype.itemsize != 2 or x.is_contiguous():
        return "tall tiles have registers for 16-bit channels-last tensors"
    if min(weight.shape[:2]) < _TALL_CHANNELS:
        return f"of fewer than {_TALL_CHANNELS} channels all tiles are tall"
    return why_not(x, weight, *args)


def candidates(op: str) -> tuple[Candidate, ...]:
    """How Triton can run `op`: conv2d_stats, conv_transpose2d_subpixel, conv2d_act or norm_act_conv_bwd."""
    run, devices = globals()[op], _triton.DEVICES
    usual = Candidate("triton", run, why_not, devices)
    if op == "norm_act_conv_bwd":  # what its epilogue reads leaves tall tiles too few registers
        return (usual,)
    return usual, Candidate("triton", partial(run, is_tall=True), why_not_tall, devices, "tall tiles")


class Neighbours(NamedTuple):
    """What a convolution runs along with itself.

    Attributes:
        scale, shift, before, slope_before: of the prologue and its activation.
        activation, slope: of the epilogue.
        statistics: whether the epilogue takes those of the result.
        norm: of whose backward this is a part; activation and slope then are those behind it.
        is_tall: whether it runs with tall tiles.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    before: str = "identity"
    slope_before: float = 0.0
    activation: str = "identity"
    slope: float = 0.0
    statistics: bool = False
    norm: Site | None = None
    is_tall: bool = False

    def operands(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift for the kernels, which read them in the dtype of the statistics."""
        wide = state_dtype(x.dtype)
        return tuple(None if t is None else t.to(wide).contiguous() for t in (self.scale, self.shift))  # type: ignore[return-value]

    def layout(self, x: Tensor) -> torch.memory_format:
        """That of x and the result; of a norm's backward its input's, which tells where a gradient of 1 x 1 does not."""
        return memory_format_of(x if self.norm is None else self.norm.x)

    @property
    def norm_operands(self) -> tuple[Tensor | None, ...]:
        """Input, mean, invstd, weight and bias of the norm for the kernels."""
        site = self.norm
        return (None,) * 5 if site is None else (site.x, site.mean, site.invstd, site.weight, site.bias)

    @property
    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        return {
            "ACT": number(self.activation),
            "SLOPE": self.slope,
            "ACT_BEFORE": number(self.before),
            "SLOPE_BEFORE": self.slope_before,
        }


def _combine(
    partial: Tensor, blocks: int, pixels: int, block_pixels: int, values: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from partials (2, rows, channels) of blocks of pixels, each of so many values."""
    _, rows, channels = partial.shape
    mean, var = partial.new_empty(channels), partial.new_empty(channels)
    block_r, block_c = COMBINE_BLOCKS
    if _triton.INTERPRETED:
        block_c = triton.next_power_of_2(channels)
    combine_stats_kernel[(triton.cdiv(channels, block_c),)](
        partial, mean, var, rows, blocks, channels, pixels, pixels * values * (rows // blocks),
        BLOCK_PIXELS=block_pixels, VALUES=values, DTYPE=_triton.math_dtype(partial), BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return mean, var


def _outputs(
    x: Tensor, shape: tuple[int, ...], rows: int, around: Neighbours
) -> tuple[Tensor, Tensor | None]:
    """An output, and the partial statistics, or sums of a norm's backward."""
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=around.layout(x))
    if not around.statistics and around.norm is None:
        return y, None
    return y, torch.empty(2, rows, shape[1], dtype=state_dtype(x.dtype), device=x.device)


def _results(
    y: Tensor,
    partial: Tensor | None,
    around: Neighbours,
    blocks: int,
    pixels: int,
    block_pixels: int,
    values: int,
) -> tuple[Tensor, ...]:
    """(y,), (y, mean, var) or, of a norm's backward, (y, sums (2, channels)); further arguments as in `_combine`."""
    if partial is None:
        return (y,)
    if around.norm is not None:
        return y, partial.sum(1)
    return y, *_combine(partial, blocks, pixels, block_pixels, values)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    around: Neighbours,
) -> tuple[Tensor, ...]:
    """The `_results` of the convolution and its neighbours."""
    all_out, channels, taps_y, taps_x = weight.shape
    layout = around.layout(x)
    x = x.contiguous(memory_format=layout)
    n, _, h, w = x.shape
    out_h, out_w = (
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip((h, w), padding, (taps_y, taps_x), stride, strict=True)
    )
    pixels, out_channels = n * out_h * out_w, all_out // groups
    precision = precision_of(x.dtype)
    in_rows = steps_by_row(channels, taps_x)
    in_step = taps_x * channels if in_rows else channels
    blocks = _blocks(
        x, pixels, in_step, out_channels, precision, tiles(around.norm is not None, layout), around
    )
    rows = triton.cdiv(pixels, blocks.m)
    y, partial = _outputs(x, (n, all_out, out_h, out_w), rows, around)
    with torch.cuda.device_of(x):
        conv2d_stats_fwd_kernel[(rows * groups * triton.cdiv(out_channels, blocks.n),)](
            x, weight.permute(2, 3, 1, 0).contiguous(), None if bias is None else bias.contiguous(),
            *around.operands(x), y, partial, *around.norm_operands, pixels, groups, channels, h, w,
            out_channels, out_h, out_w, *stride, *padding,
            KH=taps_y, KW=taps_x, ROW=in_rows, CHANNELS_LAST=layout == torch.channels_last,
            DTYPE=_triton.math_dtype(x), PRECISION=precision, **around.constants, **blocks.constants, **blocks.options,
        )  # fmt: skip
        return _results(y, partial, around, rows, pixels, blocks.m, 1)


def _conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, around: Neighbours
) -> tuple[Tensor, ...]:
    """The `_results` of the transposed convolution of kernel 4, stride 2, padding 1 and its neighbours."""
    channels, out_channels = weight.shape[:2]
    layout = around.layout(x)
    x = x.contiguous(memory_format=layout)
    n, _, h, w = x.shape
    pixels = n * h * w
    precision = precision_of(x.dtype)
    blocks = _blocks(x, pixels, channels, out_channels, precision, 2, around)
    rows = triton.cdiv(pixels, blocks.m)
    y, partial = _outputs(x, (n, out_channels, 2 * h, 2 * w), 2 * rows, around)
    with torch.cuda.device_of(x):
        conv_transpose2d_subpixel_fwd_kernel[(rows, triton.cdiv(out_channels, blocks.n), 2)](
            x, weight.permute(2, 3, 0, 1).contiguous(), None if bias is None else bias.contiguous(),
            *around.operands(x), y, partial, *around.norm_operands, pixels, channels, h, w, out_channels,
            CHANNELS_LAST=layout == torch.channels_last, DTYPE=_triton.math_dtype(x), PRECISION=precision,
            **around.constants, **blocks.constants, **blocks.options,
        )  # fmt: skip
        return _results(y, partial, around, rows, pixels, blocks.m, 2)


def conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    scale: Tensor | None,
    shift: Tensor | None,
    before: str,
    slope_before: float,
    *,
    is_tall: bool = False,
) -> tuple[Tensor, ...]:
    """Op `conv2d_stats`: (y, mean, var)."""
    around = Neighbours(scale, shift, before, slope_before, statistics=True, is_tall=is_tall)
    return _conv2d(x, weight, bias, (stride_y, stride_x), (pad_y, pad_x), 1, around)


def conv_transpose2d_subpixel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    before: str,
    slope_before: float,
    *,
    is_tall: bool = False,
) -> tuple[Tensor, ...]:
    """Op `conv_transpose2d_subpixel`: (y, mean, var)."""
    around = Neighbours(scale, shift, before, slope_before, statistics=True, is_tall=is_tall)
    return _conv_transpose2d(x, weight, bias, around)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
    *,
    is_tall: bool = False,
) -> Tensor:
    """Op `conv2d_act`: y."""
    around = Neighbours(activation=activation, slope=negative_slope, is_tall=is_tall)
    if transposed:
        return _conv_transpose2d(x, weight, bias, around)[0]
    return _conv2d(x, weight, bias, (stride_y, stride_x), (pad_y, pad_x), groups, around)[0]


def norm_act_conv_bwd(
    x: Tensor,
    conv_weight: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    stride_y: int,
    stride_x: int,
    pad_y: int,
    pad_x: int,
    groups: int,
    transposed: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Op `norm_act_conv_bwd`: (dx, dweight, dbias). The gradient of a convolution's input is a convolution, too."""
    x = x.contiguous(memory_format=memory_format_of(x))
    no_act = number("identity"), 0.0  # the convolution's epilogue has been through it
    site = Site(x, mean, invstd, wide(weight, x), wide(bias, x), None, None, None, *no_act)
    around = Neighbours(activation=activation, slope=negative_slope, norm=site)
    stride, pad, taps = (stride_y, stride_x), (pad_y, pad_x), conv_weight.shape[2:]
    if transposed:
        g, sums = _conv2d(dy, conv_weight, None, stride, pad, groups, around)
    elif stride == (1, 1):
        turned = conv_weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        full = [size - 1 - p for size, p in zip(taps, pad, strict=True)]
        g, sums = _conv2d(dy, turned, None, stride, full, groups, around)
    else:
        g, sums = _conv_transpose2d(dy, conv_weight, None, around)
    k = first_order_coefficients(site, sums / (x.numel() // x.shape[1]))
    dx, _ = triton_batch_norm_act.bwd_apply(g, site, k, False)
    dweight, dbias, _ = gradients_of_channels(sums, mean, weight, bias, None)
    return dx, dweight, dbias
