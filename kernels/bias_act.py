"""y = clamp(gain act(x + b), -clamp, clamp) of dense x with `channels` channels, and its first and second derivatives.

forward   z = x + b; keeps one or two bits an element where act is piecewise linear (reference/bias_act.py says which)
backward  dz = dy gain act'(z) where the clamp lets pass, by bits or x; db = sum dz; prelu: da = sum dy gain min(z,0)
second    q = v + v_b:  a_dy = q gain act'(z) [+ v_a gain min(z, 0)];  a_z = q dy gain act''(z)  [prelu: v_a dy gain, z <= 0]
Element i belongs to channel (i // inner) % channels: inner pixels, or 1 with the channels last (constexpr CHANNELS_LAST).
Mathematics in float32 (float64 for double); constants are constexpr, since float arguments would be float32. NaN travels.
Sums: every program writes its own to sums_ptr (of up to two kinds, splits, channels), so their order is fixed.
Bytes an element, b of the dtype: forward 2b and the bits, backward 2b and the bits or 3b, second order the same or 5b.
"""

import triton
import triton.language as tl

from .pointwise import LEAKY_RELU, PRELU, RELU, act, act_grad, act_grad_grad


@triton.jit
def _program(axis: tl.constexpr, INDEX64: tl.constexpr):
    """The program's number, in the type of offsets."""
    if INDEX64:
        return tl.program_id(axis).to(tl.int64)
    else:
        return tl.program_id(axis)


@triton.jit
def _inside(scaled, CLAMPED: tl.constexpr, CLAMP: tl.constexpr):
    """Whether the clamp leaves a value alone; a NaN counts only where there is no clamp."""
    if CLAMPED:
        return tl.abs(scaled) <= CLAMP
    else:
        return (scaled == scaled) | (scaled != scaled)


@triton.jit
def _pack(bits):
    """(n, 8) booleans to n bytes, the lowest bit first."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def _bit(plane_ptr, offset, valid):
    """Bits of a plane at element offsets."""
    byte = tl.load(plane_ptr + (offset >> 3), mask=valid, other=0).to(tl.int32)
    return ((byte >> (offset & 7).to(tl.int32)) & 1) != 0


@triton.jit
def _through_mask(
    g,
    mask_ptr,
    offset,
    valid,
    plane_bytes,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """G times the derivative that the bits tell."""
    if ACT == LEAKY_RELU:
        result = tl.where(_bit(mask_ptr, offset, valid), g * GAIN, g * (GAIN * SLOPE))
        if CLAMPED:
            result = tl.where(_bit(mask_ptr + plane_bytes, offset, valid), result, 0.0)
    elif ACT == RELU or CLAMPED:
        result = tl.where(_bit(mask_ptr, offset, valid), g * GAIN, 0.0)
    else:
        result = g * GAIN
    return result


@triton.jit
def _parameter(ptr, channel, valid, SHAPE_OF, DTYPE: tl.constexpr):
    """One value a channel; zeros where ptr is None."""
    if ptr is None:
        return tl.zeros(SHAPE_OF.shape, DTYPE)
    else:
        return tl.load(ptr + channel, mask=valid, other=0.0).to(DTYPE)


@triton.jit(
    do_not_specialize=["plane_bytes"],  # a count of whole vectors makes wide accesses
    do_not_specialize_on_alignment=["bias_ptr", "slope_ptr", "mask_ptr"],
)
def bias_act_fwd_kernel(
    x_ptr,  # (count,)
    bias_ptr,  # (channels,) or None
    slope_ptr,  # (channels,) of prelu, or None
    y_ptr,  # out (count,)
    mask_ptr,  # out (planes * plane_bytes,) uint8, or None
    count,
    channels,
    inner,
    plane_bytes,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward over BLOCK elements, which are BLOCK / 8 bytes of each plane."""
    byte = _program(0, INDEX64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    offset = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    valid = offset < count
    x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(DTYPE)
    row = offset if CHANNELS_LAST else offset // inner
    channel = row % channels
    z = x + _parameter(bias_ptr, channel, valid, x, DTYPE)
    if ACT == PRELU:
        scaled = act(z, _parameter(slope_ptr, channel, valid, x, DTYPE), ACT) * GAIN
    else:
        scaled = act(z, SLOPE, ACT) * GAIN
    y = scaled
    if CLAMPED:
        y = tl.where(scaled > CLAMP, CLAMP, tl.where(scaled < -CLAMP, -CLAMP, scaled))
    tl.store(y_ptr + offset, y, mask=valid)
    if mask_ptr is not None:
        if ACT == LEAKY_RELU:
            first = z > 0
        elif ACT == RELU:
            first = (z > 0) | (z != z)
            first = first & _inside(scaled, CLAMPED, CLAMP)
        else:
            first = _inside(scaled, CLAMPED, CLAMP)
        tl.store(mask_ptr + byte, _pack(first & valid), mask=byte < plane_bytes)
        if ACT == LEAKY_RELU and CLAMPED:
            second = _inside(scaled, CLAMPED, CLAMP) & valid
            tl.store(mask_ptr + plane_bytes + byte, _pack(second), mask=byte < plane_bytes)


@triton.jit
def _tile(
    m_count,
    channels,
    inner,
    m,
    CHANNELS_LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(channel (1, BLOCK_C), offset and valid (BLOCK_M, BLOCK_C)) of pixels m, counted over the images."""
    channel = (_program(0, INDEX64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    pixel = m[:, None]
    if CHANNELS_LAST:
        offset = pixel * channels + channel
    else:
        row = (pixel // inner) * channels + channel
        offset = row * inner + pixel % inner
    return channel, offset, (pixel < m_count) & (channel < channels)


@triton.jit
def _store_sums(sums_ptr, kind, total, channels, BLOCK_C: tl.constexpr):
    """Write a program's sums (BLOCK_C,) of one kind."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = kind * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + row * channels + channel, total, mask=channel < channels)


@triton.jit(
    do_not_specialize=["plane_bytes", "tiles"],  # m_count of whole vectors makes wide accesses
    do_not_specialize_on_alignment=["bias_ptr", "slope_ptr", "mask_ptr", "sums_ptr"],
)
def bias_act_bwd_kernel(
    dy_ptr,  # (count,)
    x_ptr,  # (count,), or None where the mask is given
    bias_ptr,  # (channels,) or None
    slope_ptr,  # (channels,) of prelu, or None
    mask_ptr,  # (planes * plane_bytes,) uint8, or None
    dx_ptr,  # out (count,)
    sums_ptr,  # out (1 or 2, splits, channels): of dz, and of prelu's dy gain min(z, 0); or None
    m_count,
    channels,
    inner,
    plane_bytes,
    tiles,  # of each program
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward over `tiles` tiles of (BLOCK_M, BLOCK_C)."""
    dz_sum = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    slope_sum = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    for tile in range(0, tiles):
        start = (_program(1, INDEX64) * tiles + tile) * BLOCK_M
        m = start + tl.arange(0, BLOCK_M)
        channel, offset, valid = _tile(m_count, channels, inner, m, CHANNELS_LAST, INDEX64, BLOCK_C)
        dy = tl.load(dy_ptr + offset, mask=valid, other=0.0).to(DTYPE)
        if x_ptr is None:
            dz = _through_mask(dy, mask_ptr, offset, valid, plane_bytes, ACT, SLOPE, GAIN, CLAMPED)
        else:
            x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(DTYPE)
            z = x + _parameter(bias_ptr, channel, channel < channels, channel, DTYPE)
            slope = _parameter(slope_ptr, channel, channel < channels, channel, DTYPE)
            g = tl.where(_inside(act(z, slope, ACT) * GAIN, CLAMPED, CLAMP), dy * GAIN, 0.0)
            dz = g * act_grad(z, slope, ACT)
            if ACT == PRELU:
                slope_sum += tl.where(valid, g * tl.where(z > 0, 0.0, z), 0.0)
        tl.store(dx_ptr + offset, dz, mask=valid)
        dz_sum += tl.where(valid, dz, 0.0)
    if sums_ptr is not None:
        _store_sums(sums_ptr, 0, tl.sum(dz_sum, axis=0), channels, BLOCK_C)
        if ACT == PRELU:
            _store_sums(sums_ptr, 1, tl.sum(slope_sum, axis=0), channels, BLOCK_C)


@triton.jit(
    do_not_specialize=["plane_bytes", "tiles"],  # m_count of whole vectors makes wide accesses
    do_not_specialize_on_alignment=[
        "v_bias_ptr",
        "v_slope_ptr",
        "bias_ptr",
        "slope_ptr",
        "mask_ptr",
        "sums_ptr",
    ],
)
def bias_act_bwd_bwd_kernel(
    v_ptr,  # (count,): cotangent of dx
    v_bias_ptr,  # (channels,) or None: cotangent of db
    v_slope_ptr,  # (channels,) or None: cotangent of da
    dy_ptr,  # (count,), or None where the mask is given; so are the next three
    x_ptr,  # (count,) or None
    bias_ptr,  # (channels,) or None
    slope_ptr,  # (channels,) of prelu, or None
    mask_ptr,  # (planes * plane_bytes,) uint8, or None
    a_dy_ptr,  # out (count,)
    a_x_ptr,  # out (count,), or None as x
    sums_ptr,  # out (1 or 2, splits, channels): of a_z, and of prelu's q dy gain [z <= 0]; or None as x
    m_count,
    channels,
    inner,
    plane_bytes,
    tiles,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMPED: tl.constexpr,
    CLAMP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adjoint of backward over `tiles` tiles of (BLOCK_M, BLOCK_C)."""
    a_z_sum = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    slope_sum = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    for tile in range(0, tiles):
        start = (_program(1, INDEX64) * tiles + tile) * BLOCK_M
        m = start + tl.arange(0, BLOCK_M)
        channel, offset, valid = _tile(m_count, channels, inner, m, CHANNELS_LAST, INDEX64, BLOCK_C)
        known = channel < channels
        q = tl.load(v_ptr + offset, mask=valid, other=0.0).to(DTYPE)
        q += _parameter(v_bias_ptr, channel, known, channel, DTYPE)
        if x_ptr is None:
            a_dy = _through_mask(q, mask_ptr, offset, valid, plane_bytes, ACT, SLOPE, GAIN, CLAMPED)
        else:
            x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(DTYPE)
            dy = tl.load(dy_ptr + offset, mask=valid, other=0.0).to(DTYPE)
            z = x + _parameter(bias_ptr, channel, known, channel, DTYPE)
            slope = _parameter(slope_ptr, channel, known, channel, DTYPE)
            passes = _inside(act(z, slope, ACT) * GAIN, CLAMPED, CLAMP)
            g = tl.where(passes, dy * GAIN, 0.0)
            a_dy = q * act_grad(z, slope, ACT)
            if ACT == PRELU:
                v_slope = _parameter(v_slope_ptr, channel, known, channel, DTYPE)
                a_dy += v_slope * tl.where(z > 0, 0.0, z)
                a_z = tl.where(z > 0, 0.0, g * v_slope)
                slope_sum += tl.where(valid & ((z > 0) == 0), g * q, 0.0)
            else:
                a_z = q * g * act_grad_grad(z, ACT)
            a_dy = tl.where(passes, a_dy * GAIN, 0.0)
            tl.store(a_x_ptr + offset, a_z, mask=valid)
            a_z_sum += tl.where(valid, a_z, 0.0)
        tl.store(a_dy_ptr + offset, a_dy, mask=valid)
    if sums_ptr is not None:
        _store_sums(sums_ptr, 0, tl.sum(a_z_sum, axis=0), channels, BLOCK_C)
        if ACT == PRELU:
            _store_sums(sums_ptr, 1, tl.sum(slope_sum, axis=0), channels, BLOCK_C)
