"""Convolution with its neighbours in a block: a norm's pass before it, an activation or a norm's statistics behind it.

a = act_before(scale[c] x + shift[c]), or x;  y = act(z), z[p, o] = bias[o] + sum_{i,j,c} a[pixel(p,i,j), c] w[i, j, c, o]
mean[o], var[o] of y over all p (biased). Zeros around the image are zeros of a. With groups, c and o are of one group.
Where z is the gradient of act(n), n = w_n xhat + b_n a norm of x_n, xhat = (x_n - mean) invstd: y = G = z act'(n), and
the sums of G and G xhat, of which the norm's backward makes its coefficients (batch_norm_act.py).
An implicit matrix product: rows p are output pixels, the inner dimension is the channels, one tap after the other in nested
static loops (a single flattened loop over taps and channels miscompiles with 8 warps); of few channels, a row of taps.
Accumulates in float32 (float64); a is rounded to x's dtype. Statistics are of y as it is stored: programs write mean and sum
of squared deviations of their pixels, a second kernel combines them in a fixed order (Chan, Golub, LeVeque 1979).
Bytes: x once (read once a tap, but for the first time from cache), w once, y once, partials 8 / BLOCK_M a value of y. Saved:
by the prologue a pass that reads and writes x, by the activation the same of y, by the statistics one that reads y. In a
norm's backward: x_n once more, which is of the size of y; saved is the pass that reads y and x_n for the sums.
"""

import triton
import triton.language as tl

from .channel_tiles import load_channels
from .pointwise import act, act_grad


@triton.jit
def normalised(
    x, mask, c, valid, scale_ptr, shift_ptr, DTYPE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr
):
    """Of a tile (pixels, channels c): act(scale x + shift) in x's own dtype, zero where masked; x without scale_ptr."""
    if scale_ptr is None:
        return x
    else:
        scale = tl.load(scale_ptr + c, mask=valid, other=0.0).to(DTYPE)[None, :]
        shift = tl.load(shift_ptr + c, mask=valid, other=0.0).to(DTYPE)[None, :]
        a = act(x.to(DTYPE) * scale + shift, SLOPE, ACT)
        return tl.where(mask, a, 0.0).to(x.dtype)


@triton.jit
def standardised(x, o, valid, mean_ptr, invstd_ptr, DTYPE: tl.constexpr):
    """Of a tile (pixels, channels o) of a norm's input: (x - mean) invstd."""
    mean = load_channels(mean_ptr, o, valid, 0.0, DTYPE)[None, :]
    invstd = load_channels(invstd_ptr, o, valid, 1.0, DTYPE)[None, :]
    return (x.to(DTYPE) - mean) * invstd


@triton.jit
def through_act(
    dy, xhat, o, valid, weight_ptr, bias_ptr, DTYPE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr
):
    """The gradient of a norm's result from that of the activation behind it."""
    weight = load_channels(weight_ptr, o, valid, 1.0, DTYPE)[None, :]
    bias = load_channels(bias_ptr, o, valid, 0.0, DTYPE)[None, :]
    return dy * act_grad(xhat * weight + bias, SLOPE, ACT)


@triton.jit
def store_partial(ptr, row, rows, o, valid, channels, first, second):
    """Write two numbers per channel of one program to row `row` of ptr (2, rows, channels)."""
    offset = row.to(tl.int64) * channels + o
    tl.store(ptr + offset, first, mask=valid)
    tl.store(ptr + rows.to(tl.int64) * channels + offset, second, mask=valid)


@triton.jit
def conv2d_stats_fwd_kernel(
    x_ptr,  # (N, C, H, W), contiguous or channels-last
    w_ptr,  # (KH, KW, C / groups, O) contiguous
    bias_ptr,  # (O,) or None
    scale_ptr,  # (C,) or None: no prologue
    shift_ptr,  # (C,) or None
    y_ptr,  # out (N, O, OH, OW), layout of x
    partial_ptr,  # out (2, blocks of pixels, O): mean, squared deviations; or sums of a norm's backward; or None
    norm_x_ptr,  # like y: the norm's input, of whose backward this is a part; or None
    mean_ptr,  # (O,) of the norm, or None
    invstd_ptr,  # (O,) of the norm, or None
    norm_weight_ptr,  # (O,) or None
    norm_bias_ptr,  # (O,) or None
    pixels,  # N * OH * OW
    groups,
    channels,  # of a group, C / groups
    height,
    width,
    out_channels,  # of a group, O / groups
    out_height,
    out_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROW: tl.constexpr,  # whether BLOCK_K holds a row of taps
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
    """One block of pixels x output channels of one group; programs of one block of pixels are neighbours."""
    columns = groups * tl.cdiv(out_channels, BLOCK_N)
    block, group = tl.program_id(0) // columns, tl.program_id(0) % columns // tl.cdiv(out_channels, BLOCK_N)
    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    of_group = tl.program_id(0) % tl.cdiv(out_channels, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    o, is_o = group * out_channels + of_group, of_group < out_channels
    k = tl.arange(0, BLOCK_K)
    image = p // (out_height * out_width)
    place = p % (out_height * out_width)
    row = place // out_width * stride_y - pad_y
    column = place % out_width * stride_x - pad_x
    inside = p < pixels

    all_channels, all_out = groups * channels, groups * out_channels
    step = 1 if CHANNELS_LAST else height * width  # from channel to channel
    pixel = all_channels if CHANNELS_LAST else 1  # from pixel to pixel
    images = image.to(tl.int64) * all_channels * height * width
    acc = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for i in tl.static_range(KH):
        hit_row = inside & (row + i >= 0) & (row + i < height)
        for j in tl.static_range(1 if ROW else KW):
            hit = hit_row & (column + j >= 0) & (column + j < width)
            x_row = x_ptr + images + ((row + i) * width + column + j) * pixel
            w_tap = w_ptr + (i * KW + j) * channels * all_out
            for first in range(0, channels, BLOCK_K):
                if ROW:
                    c, tap, is_k = k % channels, k // channels, k < KW * channels
                    there = column[:, None] + tap[None, :]
                    mask = hit_row[:, None] & (there >= 0) & (there < width) & is_k[None, :]
                    x_ptrs = x_row[:, None] + (tap * pixel + (group * channels + c) * step)[None, :]
                else:
                    c = first + k
                    is_k = c < channels
                    mask = hit[:, None] & is_k[None, :]
                    x_ptrs = x_row[:, None] + ((group * channels + c) * step)[None, :]
                x = tl.load(x_ptrs, mask=mask, other=0.0)
                x = normalised(
                    x, mask, group * channels + c, is_k, scale_ptr, shift_ptr, DTYPE, ACT_BEFORE, SLOPE_BEFORE
                )
                w = tl.load(
                    w_tap + (first + k)[:, None] * all_out + o[None, :],
                    mask=is_k[:, None] & is_o[None, :],
                    other=0.0,
                )
                acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=DTYPE)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=is_o, other=0.0).to(DTYPE)[None, :]

    outputs = image.to(tl.int64) * all_out * out_height * out_width
    if CHANNELS_LAST:
        offsets = (outputs + place * all_out)[:, None] + o[None, :]
    else:
        offsets = (outputs + place)[:, None] + (o * out_height * out_width)[None, :]
    mask = inside[:, None] & is_o[None, :]
    if norm_x_ptr is None:
        y = act(acc, SLOPE, ACT).to(y_ptr.dtype.element_ty)
    else:
        norm_x = tl.load(norm_x_ptr + offsets, mask=mask, other=0.0)
        xhat = standardised(norm_x, o, is_o, mean_ptr, invstd_ptr, DTYPE)
        y = through_act(acc, xhat, o, is_o, norm_weight_ptr, norm_bias_ptr, DTYPE, ACT, SLOPE)
        y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)

    if partial_ptr is not None:
        stored = tl.where(inside[:, None], y.to(DTYPE), 0.0)
        if norm_x_ptr is None:
            first = tl.sum(stored, 0) / tl.minimum(pixels - block * BLOCK_M, BLOCK_M).to(DTYPE)
            deviation = tl.where(inside[:, None], stored - first[None, :], 0.0)
            second = tl.sum(deviation * deviation, 0)
        else:
            first = tl.sum(stored, 0)
            second = tl.sum(stored * xhat, 0)
        store_partial(partial_ptr, block, tl.cdiv(pixels, BLOCK_M), o, is_o, all_out, first, second)


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
