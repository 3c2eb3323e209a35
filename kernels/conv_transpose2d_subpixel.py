"""Transposed convolution of kernel 4, stride 2, padding 1 as four 2 x 2 convolutions, with the statistics of its result.

y[2i + a, 2j + b, o] = bias[o] + sum over rows (i, tap 1 + a), (i - 1 + 2a, tap 3 - 3a) and columns (j, tap 1 + b),
(j - 1 + 2b, tap 3 - 3b), and over channels c, of x[row, column, c] w[tap of the row, tap of the column, c, o]
No zeros are inserted and nothing is scattered: a quarter of the products of a convolution on the upsampled image. A program
does the two columns b of one a, for a block of pixels (i, j) and of output channels: the middle column is read for both.
Accumulators, statistics and their combination: see conv2d_stats. x is read from cache, y is written once.
"""

import triton
import triton.language as tl

from .conv2d_stats import store_partial


@triton.jit
def _pixels(row_ptrs, column, width, pixel, hit, c, step, channels):
    """Channels c of one pixel for each pointer to a row: (BLOCK_M, BLOCK_K)."""
    mask = (hit & (column >= 0) & (column < width))[:, None] & (c < channels)[None, :]
    return tl.load((row_ptrs + column * pixel)[:, None] + (c * step)[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(tap_ptr, c, channels, o, out_channels):
    """One tap's (BLOCK_K, BLOCK_N)."""
    mask = (c < channels)[:, None] & (o < out_channels)[None, :]
    return tl.load(tap_ptr + c[:, None] * out_channels + o[None, :], mask=mask, other=0.0)


@triton.jit
def conv_transpose2d_subpixel_fwd_kernel(
    x_ptr,  # (N, C, H, W), contiguous or channels-last
    w_ptr,  # (4, 4, C, O) contiguous
    bias_ptr,  # (O,) or None
    y_ptr,  # out (N, O, 2H, 2W), layout of x
    partial_ptr,  # out (2, 2 * blocks of pixels, O): mean, squared deviations; rows a * blocks + block
    pixels,  # N * H * W
    channels,
    height,
    width,
    out_channels,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,  # of accumulators and statistics
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
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
            middle = _pixels(x_row, j, width, pixel, hit, c, step, channels)
            w = _weights(w_row + tap, c, channels, o, out_channels)
            even = tl.dot(middle, w, even, input_precision=PRECISION, out_dtype=DTYPE)
            w = _weights(w_row + 2 * tap, c, channels, o, out_channels)
            odd = tl.dot(middle, w, odd, input_precision=PRECISION, out_dtype=DTYPE)
            left = _pixels(x_row, j - 1, width, pixel, hit, c, step, channels)
            w = _weights(w_row + 3 * tap, c, channels, o, out_channels)
            even = tl.dot(left, w, even, input_precision=PRECISION, out_dtype=DTYPE)
            right = _pixels(x_row, j + 1, width, pixel, hit, c, step, channels)
            w = _weights(w_row, c, channels, o, out_channels)
            odd = tl.dot(right, w, odd, input_precision=PRECISION, out_dtype=DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=o < out_channels, other=0.0).to(DTYPE)
        even += bias[None, :]
        odd += bias[None, :]

    even_y, odd_y = even.to(y_ptr.dtype.element_ty), odd.to(y_ptr.dtype.element_ty)
    outputs = image.to(tl.int64) * out_channels * height * width * 4
    place = (2 * i + a) * 2 * width + 2 * j
    mask = inside[:, None] & (o < out_channels)[None, :]
    if CHANNELS_LAST:
        y_ptrs = y_ptr + (outputs + place * out_channels)[:, None] + o[None, :]
        tl.store(y_ptrs, even_y, mask=mask)
        tl.store(y_ptrs + out_channels, odd_y, mask=mask)
    else:
        # Neighbouring pixels of a row lie side by side: both columns are written together.
        pair = tl.interleave(outputs + place, outputs + place + 1)
        both = tl.interleave(tl.trans(even_y), tl.trans(odd_y))
        there = tl.interleave(inside.to(tl.int32), inside.to(tl.int32)) > 0
        y_ptrs = y_ptr + (o * (4 * height * width))[:, None] + pair[None, :]
        tl.store(y_ptrs, both, mask=(o < out_channels)[:, None] & there[None, :])

    even = tl.where(inside[:, None], even_y.to(DTYPE), 0.0)
    odd = tl.where(inside[:, None], odd_y.to(DTYPE), 0.0)
    mean = tl.sum(even + odd, 0) / (2 * tl.minimum(pixels - block * BLOCK_M, BLOCK_M)).to(DTYPE)
    even = tl.where(inside[:, None], even - mean[None, :], 0.0)
    odd = tl.where(inside[:, None], odd - mean[None, :], 0.0)
    m2 = tl.sum(even * even + odd * odd, 0)
    blocks = tl.num_programs(0)
    store_partial(partial_ptr, a * blocks + block, 2 * blocks, o, out_channels, mean, m2)
