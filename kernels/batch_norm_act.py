"""Batch normalisation, activation and optional residual: y = act(z), z = w xhat + b + r, xhat = (x - mean) invstd.

backward      G = dy act'(z): S1 = sum G, S2 = sum G xhat, prelu: sum dy min(z, 0);   dx = k0 G + k1 + k2 xhat, dr = G
second order  V, v_r cotangents of dx, dr; h = dy act''(z) (prelu: dy [z <= 0]): up to twelve sums in one pass, then
              q = k0 V + k1 + k2 xhat + v_r, a_dy = q act'(z) + k3 min(z, 0), a_z = a_r = h q (prelu: k3 h, others: 0),
              a_x = k4 V + k5 G + k6 a_z + k7 + k8 xhat
launch/batch_norm_act.py makes the coefficients k of the sums. Tensors are (samples, channels, size) contiguous, or channels
last: (size, channels), samples = 1. Statistics, sums and per-channel operands are float32 (float64 for float64).
Instance norm of (samples, size, channels): what is (channels,) here then is (samples channels,), see channel_tiles.py.
Passes over the tensor: statistics 1, forward 2, backward 2 and 3, second order 3 and 5; a residual, v_r one more each.
Every program of a reduction writes one partial, so the order of sums is fixed. `mask` holds one bit an element in memory
order, the lowest first: the sign of z. ALIGNED promises that every row of every tile starts at 16 bytes.
"""

import triton
import triton.language as tl

from .channel_tiles import (
    ROWS,
    element_ptrs,
    end_and_step,
    first_chunk,
    load_channels,
    load_elements,
    load_positive,
    load_slope,
    operand_rows,
    store_positive,
    store_sum,
    tile_index,
)
from .pointwise import PRELU, act, act_grad, act_grad_grad, act_grad_of_sign, is_positive


@triton.jit
def grad_of_act(z, mask_ptr, row, col, inside, slope, ACT: tl.constexpr):
    """The derivative of the activation, from the mask where there is one."""
    if mask_ptr is None:
        return act_grad(z, slope, ACT)
    else:
        return act_grad_of_sign(load_positive(mask_ptr, row, col, inside), slope, ACT, z.dtype)


@triton.jit
def second_factor(dy, z, ACT: tl.constexpr):
    """The tile h: dy act''(z), and dy where z <= 0 for prelu."""
    if ACT == PRELU:
        return tl.where(z > 0, 0.0, dy)
    else:
        return dy * act_grad_grad(z, ACT)


@triton.jit(do_not_specialize=["samples", "chunks"], do_not_specialize_on_alignment=["x_ptr", "out_ptr"])
def batch_norm_act_stats_kernel(
    x_ptr,
    out_ptr,  # out (programs, 3, channels): number of values, mean, sum of squared deviations
    samples,
    channels,
    size,
    chunks,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Statistics of every program's share of the tiles."""
    axis: tl.constexpr = 1 if LAYOUT == ROWS else 0
    first = first_chunk(chunks, samples, LAYOUT)
    _, _, row, col, inside = tile_index(first, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
    x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
    number = inside.to(DTYPE)
    count = tl.sum(number, axis=axis, keep_dims=True)
    shift = tl.sum(x, axis=axis, keep_dims=True) / tl.where(count == 0, 1.0, count)
    total = tl.where(inside, x - shift, 0.0)
    squares = total * total
    end, step = end_and_step(chunks, samples, LAYOUT)
    for chunk in range(first + step, end, step):
        _, _, row, col, inside = tile_index(chunk, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
        x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
        d = tl.where(inside, x - shift, 0.0)
        number += inside.to(DTYPE)
        total += d
        squares += d * d
    number = tl.sum(number, axis=axis, keep_dims=True)
    total = tl.sum(total, axis=axis, keep_dims=True)
    squares = tl.sum(squares, axis=axis, keep_dims=True)
    delta = total / tl.where(number == 0, 1.0, number)
    m2 = squares - total * delta
    # Rounding can make it negative; NaN stays.
    m2 = tl.where(m2 < 0, 0.0, m2)
    store_sum(out_ptr, 0, 3, number, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 1, 3, shift + delta, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 2, 3, m2, samples, channels, LAYOUT, BLOCK_C)


@triton.jit(
    do_not_specialize=["channels", "programs"], do_not_specialize_on_alignment=["partial_ptr", "out_ptr"]
)
def batch_norm_act_combine_kernel(
    partial_ptr,  # (programs, 3, channels): number of values, mean, sum of squared deviations
    out_ptr,  # out (2, channels): mean, sum of squared deviations
    channels,
    programs,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Combine statistics by Chan's formula."""
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    ptr = partial_ptr + c
    # Relative to the first mean, so that a large common mean costs no digits.
    origin = tl.load(ptr + channels, mask=c < channels, other=0.0)
    count = tl.zeros([1, BLOCK_C], DTYPE)
    total = tl.zeros([1, BLOCK_C], DTYPE)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < programs) & (c < channels)
        n = tl.load(ptr + p * 3 * channels, mask=inside, other=0.0)
        mean = tl.load(ptr + (p * 3 + 1) * channels, mask=inside, other=0.0)
        count += tl.sum(n, axis=0, keep_dims=True)
        total += tl.sum(tl.where(inside, n * (mean - origin), 0.0), axis=0, keep_dims=True)
    delta = total / tl.where(count == 0, 1.0, count)
    m2 = tl.zeros([1, BLOCK_C], DTYPE)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < programs) & (c < channels)
        n = tl.load(ptr + p * 3 * channels, mask=inside, other=0.0)
        d = tl.load(ptr + (p * 3 + 1) * channels, mask=inside, other=0.0) - origin - delta
        own = tl.load(ptr + (p * 3 + 2) * channels, mask=inside, other=0.0)
        m2 += tl.sum(tl.where(inside, own + n * d * d, 0.0), axis=0, keep_dims=True)
    tl.store(out_ptr + c, origin + delta, mask=c < channels)
    tl.store(out_ptr + channels + c, m2, mask=c < channels)


@triton.jit(
    do_not_specialize=["samples", "chunks"],
    do_not_specialize_on_alignment=[
        "x_ptr", "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "slope_ptr", "y_ptr", "mask_ptr",
    ],
)  # fmt: skip
def batch_norm_act_fwd_kernel(
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    residual_ptr,  # or None
    slope_ptr,  # (channels,) or (1,) of prelu, or None
    y_ptr,  # out
    mask_ptr,  # out: one bit an element, or None
    samples,
    channels,
    size,
    chunks,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Normalise and activate one tile."""
    chunk = tl.program_id(0)
    c, c_in, row, col, inside = tile_index(chunk, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
    mean, invstd = (
        load_channels(mean_ptr, c, c_in, 0.0, DTYPE),
        load_channels(invstd_ptr, c, c_in, 1.0, DTYPE),
    )
    weight, bias = (
        load_channels(weight_ptr, c, c_in, 1.0, DTYPE),
        load_channels(bias_ptr, c, c_in, 0.0, DTYPE),
    )
    slope = load_slope(slope_ptr, c, c_in, ONE_SLOPE, NEGATIVE_SLOPE, DTYPE)
    x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
    z = (x - mean) * invstd * weight + bias + load_elements(residual_ptr, row, col, inside, DTYPE, ALIGNED)
    tl.store(element_ptrs(y_ptr, row, col, ALIGNED), act(z, slope, ACT), mask=inside)
    if mask_ptr is not None:
        positive = is_positive(z, ACT) & inside
        store_positive(mask_ptr, positive, chunk, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)


@triton.jit(
    do_not_specialize=["samples", "chunks"],
    do_not_specialize_on_alignment=[
        "dy_ptr", "x_ptr", "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "mask_ptr", "slope_ptr",
        "out_ptr",
    ],
)  # fmt: skip
def batch_norm_act_bwd_reduce_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    residual_ptr,  # or None
    mask_ptr,  # the sign of z, or None: it is computed
    slope_ptr,  # (channels,) or (1,) of prelu, or None
    out_ptr,  # out (programs, 2, or 3 for prelu, channels): S1, S2, sum dy min(z, 0)
    samples,
    channels,
    size,
    chunks,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sums of the first order."""
    first = first_chunk(chunks, samples, LAYOUT)
    c, c_in, row, col, inside = tile_index(first, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
    mean, invstd = (
        load_channels(mean_ptr, c, c_in, 0.0, DTYPE),
        load_channels(invstd_ptr, c, c_in, 1.0, DTYPE),
    )
    weight, bias = (
        load_channels(weight_ptr, c, c_in, 1.0, DTYPE),
        load_channels(bias_ptr, c, c_in, 0.0, DTYPE),
    )
    slope = load_slope(slope_ptr, c, c_in, ONE_SLOPE, NEGATIVE_SLOPE, DTYPE)
    s1 = tl.zeros(inside.shape, DTYPE)
    s2 = tl.zeros(inside.shape, DTYPE)
    s3 = tl.zeros(inside.shape, DTYPE)
    end, step = end_and_step(chunks, samples, LAYOUT)
    for chunk in range(first, end, step):
        _, _, row, col, inside = tile_index(chunk, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
        dy = load_elements(dy_ptr, row, col, inside, DTYPE, ALIGNED)
        x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
        xhat = (x - mean) * invstd
        z = xhat * weight + bias + load_elements(residual_ptr, row, col, inside, DTYPE, ALIGNED)
        g = dy * grad_of_act(z, mask_ptr, row, col, inside, slope, ACT)
        s1 += g
        s2 += g * xhat
        if ACT == PRELU:
            s3 += dy * tl.where(z > 0, 0.0, z)
    sums: tl.constexpr = 3 if ACT == PRELU else 2
    store_sum(out_ptr, 0, sums, s1, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 1, sums, s2, samples, channels, LAYOUT, BLOCK_C)
    if ACT == PRELU:
        store_sum(out_ptr, 2, sums, s3, samples, channels, LAYOUT, BLOCK_C)


@triton.jit(
    do_not_specialize=["samples", "chunks"],
    do_not_specialize_on_alignment=[
        "dy_ptr", "x_ptr", "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "mask_ptr", "slope_ptr",
        "k_ptr", "dx_ptr", "dresidual_ptr",
    ],
)  # fmt: skip
def batch_norm_act_bwd_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    residual_ptr,  # or None
    mask_ptr,  # the sign of z, or None: it is computed
    slope_ptr,  # (channels,) or (1,) of prelu, or None
    k_ptr,  # (3, channels)
    dx_ptr,  # out
    dresidual_ptr,  # out, or None
    samples,
    channels,
    size,
    chunks,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The gradients of x and of the residual, one tile."""
    c, c_in, row, col, inside = tile_index(
        tl.program_id(0), samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S
    )
    mean, invstd = (
        load_channels(mean_ptr, c, c_in, 0.0, DTYPE),
        load_channels(invstd_ptr, c, c_in, 1.0, DTYPE),
    )
    weight, bias = (
        load_channels(weight_ptr, c, c_in, 1.0, DTYPE),
        load_channels(bias_ptr, c, c_in, 0.0, DTYPE),
    )
    slope = load_slope(slope_ptr, c, c_in, ONE_SLOPE, NEGATIVE_SLOPE, DTYPE)
    dy = load_elements(dy_ptr, row, col, inside, DTYPE, ALIGNED)
    x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
    xhat = (x - mean) * invstd
    z = xhat * weight + bias + load_elements(residual_ptr, row, col, inside, DTYPE, ALIGNED)
    g = dy * grad_of_act(z, mask_ptr, row, col, inside, slope, ACT)
    rows = operand_rows(samples, channels, LAYOUT)
    k0 = load_channels(k_ptr, c, c_in, 0.0, DTYPE)
    k1 = load_channels(k_ptr + rows, c, c_in, 0.0, DTYPE)
    k2 = load_channels(k_ptr + 2 * rows, c, c_in, 0.0, DTYPE)
    tl.store(element_ptrs(dx_ptr, row, col, ALIGNED), k0 * g + k1 + k2 * xhat, mask=inside)
    if dresidual_ptr is not None:
        tl.store(element_ptrs(dresidual_ptr, row, col, ALIGNED), g, mask=inside)


@triton.jit(
    do_not_specialize=["samples", "chunks"],
    do_not_specialize_on_alignment=[
        "v_ptr", "v_residual_ptr", "dy_ptr", "x_ptr", "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr", "residual_ptr",
        "mask_ptr", "slope_ptr", "out_ptr",
    ],
)  # fmt: skip
def batch_norm_act_bwd_bwd_reduce_kernel(
    v_ptr,  # cotangent of dx, or None
    v_residual_ptr,  # cotangent of dresidual, or None
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    residual_ptr,  # or None
    mask_ptr,  # the sign of z, or None: it is computed
    slope_ptr,  # (channels,) or (1,) of prelu, or None
    out_ptr,  # out (programs, SUMS, channels)
    samples,
    channels,
    size,
    chunks,
    # 5: of V, V xhat, G, G xhat, G V; 10: and of h times 1, xhat, xhat^2, V, V xhat; 12: and of h times v_r, v_r xhat
    SUMS: tl.constexpr,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sums of the second order."""
    first = first_chunk(chunks, samples, LAYOUT)
    c, c_in, row, col, inside = tile_index(first, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
    mean, invstd = (
        load_channels(mean_ptr, c, c_in, 0.0, DTYPE),
        load_channels(invstd_ptr, c, c_in, 1.0, DTYPE),
    )
    weight, bias = (
        load_channels(weight_ptr, c, c_in, 1.0, DTYPE),
        load_channels(bias_ptr, c, c_in, 0.0, DTYPE),
    )
    slope = load_slope(slope_ptr, c, c_in, ONE_SLOPE, NEGATIVE_SLOPE, DTYPE)
    zero = tl.zeros(inside.shape, DTYPE)
    t1, t2, s1, s2, gv = zero, zero, zero, zero, zero
    h1, hx, hxx, hv, hvx, hr, hrx = zero, zero, zero, zero, zero, zero, zero
    end, step = end_and_step(chunks, samples, LAYOUT)
    for chunk in range(first, end, step):
        _, _, row, col, inside = tile_index(chunk, samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S)
        v = load_elements(v_ptr, row, col, inside, DTYPE, ALIGNED)
        dy = load_elements(dy_ptr, row, col, inside, DTYPE, ALIGNED)
        x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
        xhat = (x - mean) * invstd
        z = xhat * weight + bias + load_elements(residual_ptr, row, col, inside, DTYPE, ALIGNED)
        g = dy * grad_of_act(z, mask_ptr, row, col, inside, slope, ACT)
        t1 += v
        t2 += v * xhat
        s1 += g
        s2 += g * xhat
        gv += g * v
        if SUMS > 5:
            h = second_factor(dy, z, ACT)
            h1 += h
            hx += h * xhat
            hxx += h * xhat * xhat
            hv += h * v
            hvx += h * v * xhat
            if SUMS > 10:
                v_residual = load_elements(v_residual_ptr, row, col, inside, DTYPE, ALIGNED)
                hr += h * v_residual
                hrx += h * v_residual * xhat
    store_sum(out_ptr, 0, SUMS, t1, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 1, SUMS, t2, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 2, SUMS, s1, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 3, SUMS, s2, samples, channels, LAYOUT, BLOCK_C)
    store_sum(out_ptr, 4, SUMS, gv, samples, channels, LAYOUT, BLOCK_C)
    if SUMS > 5:
        store_sum(out_ptr, 5, SUMS, h1, samples, channels, LAYOUT, BLOCK_C)
        store_sum(out_ptr, 6, SUMS, hx, samples, channels, LAYOUT, BLOCK_C)
        store_sum(out_ptr, 7, SUMS, hxx, samples, channels, LAYOUT, BLOCK_C)
        store_sum(out_ptr, 8, SUMS, hv, samples, channels, LAYOUT, BLOCK_C)
        store_sum(out_ptr, 9, SUMS, hvx, samples, channels, LAYOUT, BLOCK_C)
    if SUMS > 10:
        store_sum(out_ptr, 10, SUMS, hr, samples, channels, LAYOUT, BLOCK_C)
        store_sum(out_ptr, 11, SUMS, hrx, samples, channels, LAYOUT, BLOCK_C)


@triton.jit(
    do_not_specialize=["samples", "chunks"],
    do_not_specialize_on_alignment=[
        "v_ptr", "v_residual_ptr", "dy_ptr", "x_ptr", "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr", "residual_ptr",
        "mask_ptr", "slope_ptr", "k_ptr", "a_x_ptr", "a_dy_ptr", "a_residual_ptr",
    ],
)  # fmt: skip
def batch_norm_act_bwd_bwd_kernel(
    v_ptr,  # cotangent of dx, or None
    v_residual_ptr,  # cotangent of dresidual, or None
    dy_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    residual_ptr,  # or None
    mask_ptr,  # the sign of z, or None: it is computed
    slope_ptr,  # (channels,) or (1,) of prelu, or None
    k_ptr,  # (9, channels)
    a_x_ptr,  # out
    a_dy_ptr,  # out
    a_residual_ptr,  # out, or None
    samples,
    channels,
    size,
    chunks,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The adjoints of x, dy and the residual, one tile."""
    c, c_in, row, col, inside = tile_index(
        tl.program_id(0), samples, channels, size, LAYOUT, BLOCK_C, BLOCK_S
    )
    mean, invstd = (
        load_channels(mean_ptr, c, c_in, 0.0, DTYPE),
        load_channels(invstd_ptr, c, c_in, 1.0, DTYPE),
    )
    weight, bias = (
        load_channels(weight_ptr, c, c_in, 1.0, DTYPE),
        load_channels(bias_ptr, c, c_in, 0.0, DTYPE),
    )
    slope = load_slope(slope_ptr, c, c_in, ONE_SLOPE, NEGATIVE_SLOPE, DTYPE)
    v = load_elements(v_ptr, row, col, inside, DTYPE, ALIGNED)
    v_residual = load_elements(v_residual_ptr, row, col, inside, DTYPE, ALIGNED)
    dy = load_elements(dy_ptr, row, col, inside, DTYPE, ALIGNED)
    x = load_elements(x_ptr, row, col, inside, DTYPE, ALIGNED)
    xhat = (x - mean) * invstd
    z = xhat * weight + bias + load_elements(residual_ptr, row, col, inside, DTYPE, ALIGNED)
    grad = grad_of_act(z, mask_ptr, row, col, inside, slope, ACT)
    rows = operand_rows(samples, channels, LAYOUT)
    k0 = load_channels(k_ptr, c, c_in, 0.0, DTYPE)
    k1 = load_channels(k_ptr + rows, c, c_in, 0.0, DTYPE)
    k2 = load_channels(k_ptr + 2 * rows, c, c_in, 0.0, DTYPE)
    q = k0 * v + k1 + k2 * xhat + v_residual
    a_dy = q * grad
    k4 = load_channels(k_ptr + 4 * rows, c, c_in, 0.0, DTYPE)
    k5 = load_channels(k_ptr + 5 * rows, c, c_in, 0.0, DTYPE)
    k7 = load_channels(k_ptr + 7 * rows, c, c_in, 0.0, DTYPE)
    k8 = load_channels(k_ptr + 8 * rows, c, c_in, 0.0, DTYPE)
    a_x = k4 * v + k5 * (dy * grad) + k7 + k8 * xhat
    if ACT >= PRELU:
        h = second_factor(dy, z, ACT)
        if ACT == PRELU:
            k3 = load_channels(k_ptr + 3 * rows, c, c_in, 0.0, DTYPE)
            a_dy += k3 * tl.where(z > 0, 0.0, z)
            a_z = k3 * h
        else:
            a_z = h * q
        a_x += load_channels(k_ptr + 6 * rows, c, c_in, 0.0, DTYPE) * a_z
        if a_residual_ptr is not None:
            tl.store(element_ptrs(a_residual_ptr, row, col, ALIGNED), a_z, mask=inside)
    tl.store(element_ptrs(a_dy_ptr, row, col, ALIGNED), a_dy, mask=inside)
    tl.store(element_ptrs(a_x_ptr, row, col, ALIGNED), a_x, mask=inside)
