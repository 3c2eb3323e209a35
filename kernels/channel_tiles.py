"""Tiles of (samples, channels, size) tensors, or of channels-last (size, channels) ones, with per-channel operands and sums.

A tile has rows and contiguous elements in them: channels and positions (ROWS), positions and channels (CHANNELS_LAST), or
one row of neighbouring elements whatever their channels (FLAT: for bit masks whose bytes span rows). Tiles are numbered by
`chunk`, over samples and positions, and program_id(1), over blocks of channels; FLAT ones by `chunk` alone. Masks hold one
bit an element in memory order, the lowest first. ALIGNED promises that every row of every tile starts at 16 bytes.
SAMPLES_LAST: channels-last (samples, size, channels) where the channels of every sample have operands and sums of their own,
those of a sample behind those of the sample before; a tile, and a program of a reduction, has elements of one sample.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(0)
CHANNELS_LAST = tl.constexpr(1)
FLAT = tl.constexpr(2)
SAMPLES_LAST = tl.constexpr(3)


@triton.jit
def tile_index(
    chunk,
    samples,
    channels,
    size,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(places of operands, which of them exist, offsets of rows, of elements in a row, which elements exist) of one tile."""
    if LAYOUT == FLAT:
        row = (tl.cast(chunk, tl.int64) * BLOCK_S) + tl.zeros([1, 1], tl.int64)
        col = tl.arange(0, BLOCK_S)[None, :]
        inside = row + col < tl.cast(samples, tl.int64) * channels * size
        c, c_inside = ((row + col) // size) % channels, inside
    else:
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        blocks = tl.cdiv(size, BLOCK_S)
        s = tl.cast(chunk % blocks, tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        if LAYOUT == CHANNELS_LAST:
            c, s = c[None, :], s[:, None]
            row, col = s * channels, c
        elif LAYOUT == SAMPLES_LAST:
            c, s = c[None, :], s[:, None]
            row, col = (tl.cast(chunk // blocks, tl.int64) * size + s) * channels, c
        else:
            c, s = c[:, None], s[None, :]
            row, col = (tl.cast(chunk // blocks, tl.int64) * channels + c) * size, s
        c_inside = c < channels
        inside = c_inside & (s < size)
        if LAYOUT == SAMPLES_LAST:
            c += (chunk // blocks) * channels
    return c, c_inside, row, col, inside


@triton.jit
def operand_rows(samples, channels, LAYOUT: tl.constexpr):
    """The number of operands of one kind, which is the distance of coefficients."""
    return samples * channels if LAYOUT == SAMPLES_LAST else channels


@triton.jit
def first_chunk(chunks, samples, LAYOUT: tl.constexpr):
    """The first tile of this program of a reduction; SAMPLES_LAST: all programs of a sample follow each other."""
    if LAYOUT == SAMPLES_LAST:
        programs = tl.num_programs(0) // samples
        first = (tl.program_id(0) // programs) * (chunks // samples) + tl.program_id(0) % programs
    else:
        first = tl.program_id(0)
    return first


@triton.jit
def end_and_step(chunks, samples, LAYOUT: tl.constexpr):
    """Where the tiles of this program end, and how far they are apart."""
    if LAYOUT == SAMPLES_LAST:
        step = tl.num_programs(0) // samples
        end = (tl.program_id(0) // step + 1) * (chunks // samples)
    else:
        end, step = chunks, tl.num_programs(0)
    return end, step


@triton.jit
def load_elements(ptr, row, col, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile; zeros where ptr is None."""
    if ptr is None:
        return tl.zeros(inside.shape, DTYPE)
    else:
        return tl.load(element_ptrs(ptr, row, col, ALIGNED), mask=inside, other=0.0).to(DTYPE)


@triton.jit
def element_ptrs(ptr, row, col, ALIGNED: tl.constexpr):
    """Pointers of a tile."""
    ptrs = ptr + (row + col)
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return ptrs


@triton.jit
def load_channels(ptr, c, c_inside, OTHERWISE: tl.constexpr, DTYPE: tl.constexpr):
    """A per-channel operand; OTHERWISE where ptr is None."""
    if ptr is None:
        return tl.full(c.shape, OTHERWISE, DTYPE)
    else:
        return tl.load(ptr + c, mask=c_inside, other=0.0)


@triton.jit
def load_slope(ptr, c, c_inside, ONE_SLOPE: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, DTYPE: tl.constexpr):
    """The factor of negative arguments: prelu's of each channel or ONE_SLOPE of all, otherwise NEGATIVE_SLOPE."""
    return load_channels(ptr, c * 0 if ONE_SLOPE else c, c_inside, NEGATIVE_SLOPE, DTYPE)


@triton.jit
def load_positive(ptr, row, col, inside):
    """The bits of the mask."""
    offsets = row + col
    byte = tl.load(ptr + (offsets >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (offsets & 7).to(tl.int32)) & 1) != 0


@triton.jit
def store_positive(
    ptr,
    positive,
    chunk,
    samples,
    channels,
    size,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Pack the bits of a tile, whose rows are whole bytes; elements that do not exist must be False."""
    rows: tl.constexpr = positive.shape[0]
    columns: tl.constexpr = positive.shape[1]
    bits = positive.to(tl.int32) << (tl.arange(0, columns) % 8)[None, :]
    packed = tl.sum(tl.reshape(bits, [rows, columns // 8, 8]), axis=2)
    # The index of a byte is an index of elements in a tensor with rows of an eighth.
    if LAYOUT == CHANNELS_LAST:
        _, _, row, col, inside = tile_index(
            chunk, samples, channels // 8, size, LAYOUT, BLOCK_C // 8, BLOCK_S
        )
    elif LAYOUT == ROWS:
        _, _, row, col, inside = tile_index(
            chunk, samples, channels, size // 8, LAYOUT, BLOCK_C, BLOCK_S // 8
        )
    else:
        row = tl.cast(chunk, tl.int64) * (BLOCK_S // 8)
        col = tl.arange(0, BLOCK_S // 8)[None, :]
        inside = row + col < tl.cdiv(tl.cast(samples, tl.int64) * channels * size, 8)
    tl.store(ptr + (row + col), packed.to(tl.uint8), mask=inside)


@triton.jit
def store_sum(ptr, which, sums, total, samples, channels, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add a tile up per channel and write it as this program's partial: ptr (programs of a sample, sums, operands)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    value = tl.sum(total, axis=1 if LAYOUT == ROWS else 0)
    if LAYOUT == SAMPLES_LAST:
        programs = tl.num_programs(0) // samples
        sample, program = tl.program_id(0) // programs, tl.program_id(0) % programs
        place = ((program * sums + which).to(tl.int64) * samples + sample) * channels
    else:
        place = (tl.program_id(0) * sums + which).to(tl.int64) * channels
    tl.store(ptr + place + c, value, mask=c < channels)
