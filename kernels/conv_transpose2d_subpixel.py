"""Transposed convolution of kernel 4, stride 2, padding 1 as four 2 x 2 convolutions, with what stands around it in a block.

y[2i + a, 2j + b, o] = bias[o] + sum over rows (i, tap 1 + a), (i - 1 + 2a, tap 3 - 3a) and columns (j, tap 1 + b),
(j - 1 + 2b, tap 3 - 3b), and over channels c, of x[row, column, c] w[tap of the row, tap of the column, c, o]
No zeros are inserted and nothing is scattered: a quarter of the products of a convolution on the upsampled image. A program
does the two columns b of one a, for a block of pixels (i, j) and of output channels: the middle column is read for both.
Prologue (x stands for a), activation, accumulators, statistics, their combination, a norm's backward: see conv2d_stats.
Bytes: x once (it is read six times, but for the first time from cache), w once, y once, partials 4 / BLOCK_M a value of y.
"""

import triton
import triton.language as tl

from .conv2d_stats import normalised, standardised, store_partial, through_act
from .pointwise import act


@triton.jit
def conv_transpose2d_subpixel_fwd_kernel(
    x_ptr,  # (N, C, H, W), contiguous or channels-last
    w_ptr,  # (4, 4, C, O) contiguous
    bias_ptr,  # (O,) or None
    scale_ptr,  # (C,) or None: no prologue
    shift_ptr,  # (C,) or None
    y_ptr,  # out (N, O, 2H, 2W), layout of x
    partial_ptr,  # out (2, 2 * blocks of pixels, O): mean, squared deviations; rows a * blocks + block; None: no statistics
    norm_x_ptr,  # like y: the norm's input, of whose backward this is a part; or None
    mean_ptr,  # (O,) of the norm, or None
    invstd_ptr,  # (O,) of the norm, or None
    norm_weight_ptr,  # (O,) or None
    norm_bias_ptr,  # (O,) or None
    pixels,  # N * H * W
    channels,
    height,
    width,
    out_channels,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,  # of accumulators and statistics
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    ACT_BEFORE: tl.constexpr,
    SLOPE_BEFORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of input pixels x output channels, for the output rows of one parity."""
    block, a = tl.program_id(0), tl.program_id(2)
    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    image = p // (height * width)
    i, j = p % (height * width) // width, p % width
    inside = p < pixels

    step = 1 if CHANNELS_LAST else height * width  # from channel to channel
    pixel = channels if CHANNELS_LAST else 1  # from pixel to pixel
    tap = channels * out_channels
    images = x_ptr + image.to(tl.int64) * channels * height * width
    even = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    odd = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for t in tl.static_range(2):
        row = i + t * (2 * a - 1)
        w_row = w_ptr + (1 + a + t * (2 - 4 * a)) * 4 * tap
        hit = inside & (row >= 0) & (row < height)
        x_row = images + row * width * pixel
        for first in range(0, channels, BLOCK_K):
            c = first + k
            for side in tl.static_range(-1, 2):
                there = j + side
                mask = (hit & (there >= 0) & (there < width))[:, None] & (c < channels)[None, :]
                x = tl.load((x_row + there * pixel)[:, None] + (c * step)[None, :], mask=mask, other=0.0)
                x = normalised(
                    x, mask, c, c < channels, scale_ptr, shift_ptr, DTYPE, ACT_BEFORE, SLOPE_BEFORE
                )
                w_ptrs = w_row + c[:, None] * out_channels + o[None, :]
                is_w = (c < channels)[:, None] & (o < out_channels)[None, :]
                if side <= 0:
                    w = tl.load(w_ptrs + (1 - 2 * side) * tap, mask=is_w, other=0.0)
                    even = tl.dot(x, w, even, input_precision=PRECISION, out_dtype=DTYPE)
                if side >= 0:
                    w = tl.load(w_ptrs + (2 - 2 * side) * tap, mask=is_w, other=0.0)
                    odd = tl.dot(x, w, odd, input_precision=PRECISION, out_dtype=DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=o < out_channels, other=0.0).to(DTYPE)
        even += bias[None, :]
        odd += bias[None, :]

    outputs = image.to(tl.int64) * out_channels * height * width * 4
    place = (2 * i + a) * 2 * width + 2 * j
    is_o = o < out_channels
    if CHANNELS_LAST:
        offsets = (outputs + place * out_channels)[:, None] + o[None, :]
        mask = inside[:, None] & is_o[None, :]
    else:
        # Neighbouring pixels of a row lie side by side: both columns are one tile.
        pair = tl.interleave(outputs + place, outputs + place + 1)
        is_pair = tl.interleave(inside.to(tl.int32), inside.to(tl.int32)) > 0
        offsets = (o * (4 * height * width))[:, None] + pair[None, :]
        mask = is_o[:, None] & is_pair[None, :]

    if norm_x_ptr is None:
        even_y, odd_y = act(even, SLOPE, ACT), act(odd, SLOPE, ACT)
    else:
        if CHANNELS_LAST:
            even_x = tl.load(norm_x_ptr + offsets, mask=mask, other=0.0)
            odd_x = tl.load(norm_x_ptr + offsets + out_channels, mask=mask, other=0.0)
        else:
            both = tl.load(norm_x_ptr + offsets, mask=mask, other=0.0)
            even_x, odd_x = tl.split(tl.reshape(both, [BLOCK_N, BLOCK_M, 2]))
            even_x, odd_x = tl.trans(even_x), tl.trans(odd_x)
        even_xhat = standardised(even_x, o, is_o, mean_ptr, invstd_ptr, DTYPE)
        odd_xhat = standardised(odd_x, o, is_o, mean_ptr, invstd_ptr, DTYPE)
        even_y = through_act(even, even_xhat, o, is_o, norm_weight_ptr, norm_bias_ptr, DTYPE, ACT, SLOPE)
        odd_y = through_act(odd, odd_xhat, o, is_o, norm_weight_ptr, norm_bias_ptr, DTYPE, ACT, SLOPE)
    even_y, odd_y = even_y.to(y_ptr.dtype.element_ty), odd_y.to(y_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(y_ptr + offsets, even_y, mask=mask)
        tl.store(y_ptr + offsets + out_channels, odd_y, mask=mask)
    else:
        tl.store(y_ptr + offsets, tl.interleave(tl.trans(even_y), tl.trans(odd_y)), mask=mask)

    if partial_ptr is not None:
        even = tl.where(inside[:, None], even_y.to(DTYPE), 0.0)
        odd = tl.where(inside[:, None], odd_y.to(DTYPE), 0.0)
        first = tl.sum(even + odd, 0)
        if norm_x_ptr is None:
            first /= (2 * tl.minimum(pixels - block * BLOCK_M, BLOCK_M)).to(DTYPE)
            even = tl.where(inside[:, None], even - first[None, :], 0.0)
            odd = tl.where(inside[:, None], odd - first[None, :], 0.0)
            second = tl.sum(even * even + odd * odd, 0)
        else:
            second = tl.sum(even * even_xhat + odd * odd_xhat, 0)
        blocks = tl.num_programs(0)
        store_partial(partial_ptr, a * blocks + block, 2 * blocks, o, is_o, out_channels, first, second)
