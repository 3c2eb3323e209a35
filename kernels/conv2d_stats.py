"""Convolution of few channels with the batch statistics of its result, and their reduction.

y[p, o] = bias[o] + sum_{i, j, c} x[pixel(p, i, j), c] w[i, j, c, o];  mean[o], var[o] of y over all p (biased)
An implicit matrix product: rows p are output pixels, the inner dimension is the channels, one tap after the other in nested
static loops (a single flattened loop over taps and channels miscompiles with 8 warps). Accumulates in float32 (float64).
Statistics are of y as it is stored, without reading it again: each program writes mean and sum of squared deviations of its
pixels, a second kernel combines them in a fixed order. The pass over y that a batch norm would make for them is saved.
Bytes: x read once a tap (from cache), w once a block of pixels, y written once. Small channel counts only: see the launcher.
Source of the combination: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for sample variances" (1979).
"""

import triton
import triton.language as tl


@triton.jit
def store_partial(ptr, row, rows, col, channels, mean, m2):
    """Write mean and squared deviations of one program to row `row` of ptr (2, rows, channels)."""
    offset = row.to(tl.int64) * channels + col
    tl.store(ptr + offset, mean, mask=col < channels)
    tl.store(ptr + rows.to(tl.int64) * channels + offset, m2, mask=col < channels)


@triton.jit
def conv2d_stats_fwd_kernel(
    x_ptr,  # (N, C, H, W), contiguous or channels-last
    w_ptr,  # (KH, KW, C, O) contiguous
    bias_ptr,  # (O,) or None
    y_ptr,  # out (N, O, OH, OW), layout of x
    partial_ptr,  # out (2, blocks of pixels, O): mean, squared deviations
    pixels,  # N * OH * OW
    channels,
    height,
    width,
    out_channels,
    out_height,
    out_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,  # of accumulators and statistics
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of pixels x output channels."""
    block = tl.program_id(0)
    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    image = p // (out_height * out_width)
    place = p % (out_height * out_width)
    row = place // out_width * stride_y - pad_y
    column = place % out_width * stride_x - pad_x
    inside = p < pixels

    step = 1 if CHANNELS_LAST else height * width  # from channel to channel
    pixel = channels if CHANNELS_LAST else 1  # from pixel to pixel
    images = image.to(tl.int64) * channels * height * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            hit = inside & (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            x_row = x_ptr + images + ((row + i) * width + column + j) * pixel
            w_tap = w_ptr + (i * KW + j) * channels * out_channels
            for first in range(0, channels, BLOCK_K):
                c = first + k
                mask = hit[:, None] & (c < channels)[None, :]
                x = tl.load(x_row[:, None] + (c * step)[None, :], mask=mask, other=0.0)
                w = tl.load(
                    w_tap + c[:, None] * out_channels + o[None, :],
                    mask=(c < channels)[:, None] & (o < out_channels)[None, :],
                    other=0.0,
                )
                acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=DTYPE)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < out_channels, other=0.0).to(DTYPE)[None, :]

    y = acc.to(y_ptr.dtype.element_ty)
    outputs = image.to(tl.int64) * out_channels * out_height * out_width
    if CHANNELS_LAST:
        y_ptrs = y_ptr + (outputs + place * out_channels)[:, None] + o[None, :]
    else:
        y_ptrs = y_ptr + (outputs + place)[:, None] + (o * out_height * out_width)[None, :]
    tl.store(y_ptrs, y, mask=inside[:, None] & (o < out_channels)[None, :])

    stored = tl.where(inside[:, None], y.to(DTYPE), 0.0)
    mean = tl.sum(stored, 0) / tl.minimum(pixels - block * BLOCK_M, BLOCK_M).to(DTYPE)
    deviation = tl.where(inside[:, None], stored - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    store_partial(partial_ptr, block, tl.num_programs(0), o, out_channels, mean, m2)


@triton.jit
def combine_stats_kernel(
    partial_ptr,  # (2, rows, channels)
    mean_ptr,  # out (channels,)
    var_ptr,  # out (channels,)
    rows,
    blocks,  # row r is of block r % blocks
    channels,
    pixels,  # that the blocks share
    total,  # values per channel
    BLOCK_PIXELS: tl.constexpr,  # pixels of every block but the last
    VALUES: tl.constexpr,  # values per pixel in one row
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance from those of the blocks: the means' own deviations are added to the squared deviations."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_C), DTYPE)
    for first in range(0, rows, BLOCK_R):
        row = first + r
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        count = VALUES * tl.minimum(pixels - row % blocks * BLOCK_PIXELS, BLOCK_PIXELS).to(DTYPE)
        means = tl.load(partial_ptr + row[:, None].to(tl.int64) * channels + c[None, :], mask=mask, other=0.0)
        sums += tl.where(mask, means * count[:, None], 0.0)
    mean = tl.sum(sums, 0) / total.to(DTYPE)
    squares = tl.zeros((BLOCK_R, BLOCK_C), DTYPE)
    for first in range(0, rows, BLOCK_R):
        row = first + r
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        count = VALUES * tl.minimum(pixels - row % blocks * BLOCK_PIXELS, BLOCK_PIXELS).to(DTYPE)
        offset = row[:, None].to(tl.int64) * channels + c[None, :]
        means = tl.load(partial_ptr + offset, mask=mask, other=0.0)
        m2 = tl.load(partial_ptr + rows.to(tl.int64) * channels + offset, mask=mask, other=0.0)
        far = means - mean[None, :]
        squares += tl.where(mask, m2 + far * far * count[:, None], 0.0)
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(var_ptr + c, tl.sum(squares, 0) / total.to(DTYPE), mask=c < channels)
