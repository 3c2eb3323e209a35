"""Zero insertion, padding, FIR filter and decimation of dense images.

y[i, j] = gain sum_{k, l} f'[k, l] u[i down_y + k - pad_y, j down_x + l - pad_x],  u[i up_y, j up_x] = x[i, j], 0 elsewhere
f' is f if FLIP, else f turned by 180 degrees. The gradient is the same operator, up and down exchanged; nothing is saved.
Images are `planes` of pixels of `channels` elements: channels-last, or NCHW with N*C planes of one channel.
  tile      4 x 4 taps, the same factor 1 or 2 in x and y: TILE_Y x TILE_X outputs a place share what they load. Tiles start
            at multiples of UP in the padded image, so which tap meets which input is known at compile time.
  row       few taps, factors of 1 or 2, of one channel, where rows are whole vectors: a thread has N neighbours, 16 bytes,
            of some rows of y. What taps meet lies unaligned in x by nature: the whole vectors that hold it are loaded, and
            since padding is known at compile time, which of their elements meet a tap is a choice of registers.
  generic   any filter and factors, one output a place; only taps that meet an input are visited.
Sums in float32 (float64 for double); gain is constexpr, since a float argument would be float32. NaN and infinity travel.
Bytes, b of the dtype: b read a sample of x, b written a sample of y; neighbours' loads meet in the first cache.
"""

import triton
import triton.language as tl

TAPS = tl.constexpr(4)


@triton.jit
def _place(columns, rows, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number, column, row and plane of this program's places, columns fastest; the number in the type of offsets."""
    if INDEX64:
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, m % columns, m // columns % rows, m // columns // rows


@triton.jit
def _offsets(plane, row, column, height, width, channels, channel):
    return ((plane * height + row) * width + column)[:, None] * channels + channel[None, :]


@triton.jit
def _taps(f_ptr, COUNT: tl.constexpr, FLIP: tl.constexpr):
    """The filter as a tuple, in the order in which taps meet samples."""
    taps = ()
    for n in tl.static_range(COUNT):
        taps = taps + (tl.load(f_ptr + (n if FLIP else COUNT - 1 - n)),)  # noqa: RUF005 (Triton cannot unpack)
    return taps


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """A tuple of sums to come."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), DTYPE),)  # noqa: RUF005
    return sums


@triton.jit
def _add_product(
    sums,
    n: tl.constexpr,
    x,
    taps,
    ky: tl.constexpr,
    kx: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
):
    """The tuple of sums, to the n-th of which x times the tap (ky, kx), if there is one, is added."""
    if ky >= 0 and ky < TAPS_Y and kx >= 0 and kx < TAPS_X:
        return sums[:n] + (sums[n] + x * taps[ky * TAPS_X + kx],) + sums[n + 1 :]  # noqa: RUF005
    else:
        return sums


@triton.jit
def upfirdn2d_tile_kernel(
    x_ptr,
    f_ptr,  # (4, 4) contiguous
    y_ptr,  # out
    places,  # planes * rows * columns
    columns,  # of tiles
    rows,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    pad_x,
    pad_y,
    shift_x,  # -pad mod UP: the first tile starts so many outputs before the image
    shift_y,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Y: tl.constexpr,
    FLIP: tl.constexpr,
    GAIN: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M tiles of outputs x BLOCK_C channels."""
    m, column, row, plane = _place(columns, rows, INDEX64, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (m < places)[:, None] & (channel < channels)[None, :]
    row, column = row * TILE_Y - shift_y, column * TILE_X - shift_x
    in_row, in_column = (row * DOWN - pad_y) // UP, (column * DOWN - pad_x) // UP  # exact

    taps = _taps(f_ptr, TAPS * TAPS, FLIP)
    sums = _zeros(TILE_Y * TILE_X, BLOCK_M, BLOCK_C, DTYPE)
    for r in tl.static_range(((TILE_Y - 1) * DOWN + TAPS - 1) // UP + 1):
        for c in tl.static_range(((TILE_X - 1) * DOWN + TAPS - 1) // UP + 1):
            hit = (in_row + r >= 0) & (in_row + r < in_h) & (in_column + c >= 0) & (in_column + c < in_w)
            offsets = _offsets(plane, in_row + r, in_column + c, in_h, in_w, channels, channel)
            x = tl.load(x_ptr + offsets, mask=exists & hit[:, None], other=0.0).to(DTYPE)
            for i in tl.static_range(TILE_Y):
                for j in tl.static_range(TILE_X):
                    sums = _add_product(
                        sums, i * TILE_X + j, x, taps, r * UP - i * DOWN, c * UP - j * DOWN, TAPS, TAPS
                    )
    for i in tl.static_range(TILE_Y):
        for j in tl.static_range(TILE_X):
            inside = (row + i >= 0) & (row + i < out_h) & (column + j >= 0) & (column + j < out_w)
            offsets = _offsets(plane, row + i, column + j, out_h, out_w, channels, channel)
            y = (sums[i * TILE_X + j] * GAIN).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offsets, y, mask=exists & inside[:, None])


@triton.jit
def _elements(x):
    """The columns of x (BLOCK_M, n), n a power of two, as a tuple of (BLOCK_M, 1)."""
    if x.shape[1] == 1:
        return (x,)
    else:
        halves = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1)
        first, second = tl.split(halves)
        return _elements(first) + _elements(second)


@triton.jit
def _choice(elements, START: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """(BLOCK_M, COUNT): every STEP-th of the elements from START on, COUNT a power of two."""
    if COUNT == 1:
        return elements[START]
    else:
        first = _choice(elements, START, STEP, COUNT // 2)
        second = _choice(elements, START + COUNT // 2 * STEP, STEP, COUNT // 2)
        return tl.join(first, second).permute(0, 2, 1).reshape(first.shape[0], COUNT)


@triton.jit
def upfirdn2d_row_kernel(
    x_ptr,
    f_ptr,  # (TAPS_Y, TAPS_X) contiguous
    y_ptr,  # out
    places,  # planes * rows * columns
    columns,  # vectors of a row of y: N elements
    rows,  # of tiles
    in_columns,  # vectors of a row of x: N / UP_X elements
    in_h,
    out_h,
    first,  # of the vectors of a row of x, the one where the first window of its row of y begins
    pad_y,
    shift_y,  # -pad mod UP: the first tile starts so many outputs before the image
    UP_X: tl.constexpr,
    UP_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    START: tl.constexpr,  # where the first window begins in that vector, upsampled
    TILE_Y: tl.constexpr,
    N: tl.constexpr,
    FLIP: tl.constexpr,
    GAIN: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_M tiles of N x TILE_Y outputs."""
    V: tl.constexpr = N // UP_X
    m, column, row, plane = _place(columns, rows, INDEX64, BLOCK_M)
    row = row * TILE_Y - shift_y
    in_row, in_column = (row * DOWN_Y - pad_y) // UP_Y, column * DOWN_X + first  # exact
    taps = _taps(f_ptr, TAPS_Y * TAPS_X, FLIP)
    # An output's phase is its column modulo UP_X: outputs of one phase have the same taps.
    sums = _zeros(TILE_Y * UP_X, BLOCK_M, V, DTYPE)
    for r in tl.static_range(((TILE_Y - 1) * DOWN_Y + TAPS_Y - 1) // UP_Y + 1):
        elements = ()
        for v in tl.static_range((START + (N - 1) * DOWN_X + TAPS_X - 1) // N + 1):
            hit = (
                (in_row + r >= 0) & (in_row + r < in_h) & (in_column + v >= 0) & (in_column + v < in_columns)
            )
            vector = (plane * in_h + in_row + r) * in_columns + in_column + v
            offsets = vector[:, None] * V + tl.arange(0, V)[None, :]
            x = tl.load(x_ptr + offsets, mask=(hit & (m < places))[:, None], other=0.0).to(DTYPE)
            elements = elements + _elements(x)
        for phase in tl.static_range(UP_X):
            for kx in tl.static_range(TAPS_X):
                if (START + phase * DOWN_X + kx) % UP_X == 0:
                    x = _choice(elements, (START + phase * DOWN_X + kx) // UP_X, DOWN_X, V)
                    for i in tl.static_range(TILE_Y):
                        sums = _add_product(
                            sums, i * UP_X + phase, x, taps, r * UP_Y - i * DOWN_Y, kx, TAPS_Y, TAPS_X
                        )
    for i in tl.static_range(TILE_Y):
        total = sums[i] if UP_X == 1 else tl.join(sums[2 * i], sums[2 * i + 1]).reshape(BLOCK_M, N)
        inside = (row + i >= 0) & (row + i < out_h) & (m < places)
        vector = (plane * out_h + row + i) * columns + column
        offsets = vector[:, None] * N + tl.arange(0, N)[None, :]
        y = (total * GAIN).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=inside[:, None])


@triton.jit
def _first_tap(place, up):
    """The first tap that meets an input, or a place where one would be, in the window at `place` of the upsampled image."""
    rest = place % up  # as in C: of the sign of place
    return tl.where(rest > 0, up - rest, -rest)


@triton.jit
def upfirdn2d_kernel(
    x_ptr,
    f_ptr,  # (taps_y, taps_x) contiguous
    y_ptr,  # out
    places,  # planes * out_h * out_w
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    taps_x,
    taps_y,
    up_x,
    up_y,
    down_x,
    down_y,
    pad_x,
    pad_y,
    FLIP: tl.constexpr,
    GAIN: tl.constexpr,
    INDEX64: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M outputs x BLOCK_C channels."""
    m, column, row, plane = _place(out_w, out_h, INDEX64, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (m < places)[:, None] & (channel < channels)[None, :]
    place_x, place_y = column * down_x - pad_x, row * down_y - pad_y
    first_y, first_x = _first_tap(place_y, up_y), _first_tap(place_x, up_x)
    in_row, in_column = (place_y + first_y) // up_y, (place_x + first_x) // up_x  # exact
    total = tl.zeros((BLOCK_M, BLOCK_C), DTYPE)
    for i in range(tl.cdiv(taps_y, up_y)):
        ky = first_y + i * up_y
        for j in range(tl.cdiv(taps_x, up_x)):
            kx = first_x + j * up_x
            hit = (ky < taps_y) & (in_row + i >= 0) & (in_row + i < in_h)
            hit = hit & (kx < taps_x) & (in_column + j >= 0) & (in_column + j < in_w) & (m < places)
            n = ky * taps_x + kx
            tap = tl.load(f_ptr + (n if FLIP else taps_y * taps_x - 1 - n), mask=hit, other=0.0)
            offsets = _offsets(plane, in_row + i, in_column + j, in_h, in_w, channels, channel)
            x = tl.load(x_ptr + offsets, mask=exists & hit[:, None], other=0.0).to(DTYPE)
            total += x * tap[:, None]
    y = (total * GAIN).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + _offsets(plane, row, column, out_h, out_w, channels, channel), y, mask=exists)
