"""Spectral normalisation of many weights at once: y = W / sigma, sigma = u^T W v, and its first derivative.

rows      p = W v                                     and the sum of p^2 (ITERATE) or of u p of every block of rows
columns   q = W^T u, u = p / max(|p|, eps)            and the sum of q^2 of every block of columns
scale     v = q / max(|q|, eps), sigma = <q, v>, y = W / sigma: sigma without a third product, as u^T W v = <W^T u, v>
inner     <dy, W> of every block of rows;   gradient   dW = (dy - <dy, W> / sigma u v^T) / sigma
A launch serves all layers: arguments are tuples, one entry a layer, and programs are dealt out to layers in order. A launch
of rows and one of columns are a power iteration. Sums are those of blocks, added in a fixed order by whoever needs them, so
that runs are equal bit by bit. Sums, p, q and the state are float32 (float64 for double). A matrix is stored in segments of
`length` columns, rows * length apart (one segment: output channels first); column c is element (c % inner) taps + c // inner
of v, inner = columns / taps (taps 1, or channels-last). Bytes a weight: rows, columns b of the dtype; all others 2b.
"""

import triton
import triton.language as tl


@triton.jit
def _of(values, layer):
    """The layer's entry of a tuple."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(layer == i, values[i], value)
    return value


@triton.jit
def _before(sizes, layer, BLOCK: tl.constexpr):
    """Blocks of the layers before."""
    total = 0
    for i in tl.static_range(len(sizes)):
        total += tl.where(i < layer, tl.cdiv(sizes[i], BLOCK), 0)
    return total


@triton.jit
def _layer(sizes, BLOCK: tl.constexpr):
    """The layer whose block this program works on."""
    layer = 0
    first = 0
    for i in tl.static_range(len(sizes) - 1):
        first += tl.cdiv(sizes[i], BLOCK)
        layer += tl.where(tl.program_id(0) >= first, 1, 0)
    return layer


@triton.jit
def _matrix(layer, rows, columns, lengths, taps):
    """(rows, columns, length, taps) of a layer; without lengths there is one segment, without taps no order but v's."""
    n_columns = _of(columns, layer)
    length = n_columns
    if lengths is not None:
        length = _of(lengths, layer)
    n_taps = 1
    if taps is not None:
        n_taps = _of(taps, layer)
    return _of(rows, layer), n_columns, length, n_taps


@triton.jit
def _known(shape, ALIGNED: tl.constexpr):
    """The shape, of which the compiler knows that a row is one run of a multiple of 16 where it is."""
    rows, columns, length, taps = shape
    if ALIGNED:
        columns = columns // 16 * 16
        length = columns
    return rows, columns, length, taps


@triton.jit
def _offsets(r, c, rows, length, ALIGNED: tl.constexpr):
    if ALIGNED:
        return r[:, None] * length + c[None, :]
    else:
        return (c // length * rows * length + c % length)[None, :] + r[:, None] * length


@triton.jit
def _place(c, columns, taps):
    """Where in v a column is."""
    inner = columns // taps
    return c % inner * taps + c // inner


@triton.jit
def _load(ptr, offsets, r, c, rows, columns, DTYPE: tl.constexpr):
    return tl.load(ptr + offsets, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _sum(ptr, count, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of the blocks' sums."""
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, count, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total += tl.load(ptr + n, mask=n < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _norm(squares, EPS: tl.constexpr):
    """max(sqrt(squares), eps); NaN travels."""
    root = tl.sqrt(squares)
    return tl.where(root < EPS, EPS, root)


@triton.jit
def _row_products(
    w_ptr, v_ptr, norm, r, shape, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """<row r, v> / norm."""
    rows, columns, length, taps = _known(shape, ALIGNED)
    total = tl.zeros((r.shape[0], BLOCK_K), DTYPE)
    for first in range(0, columns, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        v = tl.load(v_ptr + _place(c, columns, taps), mask=c < columns, other=0.0).to(DTYPE) / norm
        total += _load(w_ptr, _offsets(r, c, rows, length, ALIGNED), r, c, rows, columns, DTYPE) * v[None, :]
    return tl.sum(total, 1)


@triton.jit
def _column_products(
    w_ptr, p_ptr, norm, c, shape, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """<column c, p> / norm."""
    rows, columns, length, _ = _known(shape, ALIGNED)
    total = tl.zeros((BLOCK_R, c.shape[0]), DTYPE)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        u = tl.load(p_ptr + r, mask=r < rows, other=0.0) / norm
        total += _load(w_ptr, _offsets(r, c, rows, length, ALIGNED), r, c, rows, columns, DTYPE) * u[:, None]
    return tl.sum(total, 0)


@triton.jit
def _is_aligned(shape):
    """Whether rows are 16-byte aligned runs, where the weight is."""
    _, columns, length, _ = shape
    return (length % 16 == 0) & (length == columns)


@triton.jit
def _vectors(rows, columns, layer, EXTRA: tl.constexpr):
    """Where a layer's vectors of `rows` and `columns` elements, and EXTRA more, begin among those of all layers."""
    return _before(rows, layer, 1) + _before(columns, layer, 1) + layer * EXTRA


@triton.jit
def spectral_norm_rows_kernel(
    ws,
    us,  # (rows,) each
    vs,  # (columns,) each
    work_ptr,  # p, out where ITERATE, and q of every layer
    row_sums_ptr,  # out: of every block of rows
    column_sums_ptr,
    rows,
    columns,
    lengths,  # or None
    taps,  # or None
    FIRST: tl.constexpr,  # v is that of vs, else q / |q|
    ITERATE: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_R products <row, v>."""
    layer = _layer(rows, BLOCK_R)
    shape = _matrix(layer, rows, columns, lengths, taps)
    n_rows, n_columns, _, _ = shape
    r = (tl.program_id(0) - _before(rows, layer, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_ptr, w_ptr = work_ptr + _vectors(rows, columns, layer, 0), _of(ws, layer)
    if FIRST:
        v_ptr, norm = _of(vs, layer), tl.full((), 1.0, DTYPE)
    else:
        v_ptr, sums_ptr = p_ptr + n_rows, column_sums_ptr + _before(columns, layer, BLOCK_C)
        norm = _norm(_sum(sums_ptr, tl.cdiv(n_columns, BLOCK_C), BLOCK_C, DTYPE), EPS)
    if _is_aligned(shape):
        p = _row_products(w_ptr, v_ptr, norm, r, shape, True, DTYPE, BLOCK_K)
    else:
        p = _row_products(w_ptr, v_ptr, norm, r, shape, False, DTYPE, BLOCK_K)
    if ITERATE:
        tl.store(p_ptr + r, p, mask=r < n_rows)
        tl.store(row_sums_ptr + tl.program_id(0), tl.sum(p * p, 0))
    else:
        u = tl.load(_of(us, layer) + r, mask=r < n_rows, other=0.0).to(DTYPE)
        tl.store(row_sums_ptr + tl.program_id(0), tl.sum(u * p, 0))


@triton.jit
def spectral_norm_columns_kernel(
    ws,
    work_ptr,  # p and q, out, of every layer
    row_sums_ptr,
    column_sums_ptr,  # out: of every block of columns
    rows,
    columns,
    lengths,
    taps,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_C products <column, u>."""
    layer = _layer(columns, BLOCK_C)
    shape = _matrix(layer, rows, columns, lengths, taps)
    n_rows, n_columns, _, n_taps = shape
    c = (tl.program_id(0) - _before(columns, layer, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_ptr, w_ptr = work_ptr + _vectors(rows, columns, layer, 0), _of(ws, layer)
    sums_ptr = row_sums_ptr + _before(rows, layer, BLOCK_R)
    norm = _norm(_sum(sums_ptr, tl.cdiv(n_rows, BLOCK_R), BLOCK_C, DTYPE), EPS)
    if _is_aligned(shape):
        q = _column_products(w_ptr, p_ptr, norm, c, shape, True, DTYPE, BLOCK_L)
    else:
        q = _column_products(w_ptr, p_ptr, norm, c, shape, False, DTYPE, BLOCK_L)
    tl.store(p_ptr + n_rows + _place(c, n_columns, n_taps), q, mask=c < n_columns)
    tl.store(column_sums_ptr + tl.program_id(0), tl.sum(q * q, 0))


@triton.jit
def _copy(
    source, norm, target, state, first, end, DTYPE: tl.constexpr, BLOCK: tl.constexpr, UPDATE: tl.constexpr
):
    """Elements [first, first + BLOCK) of a vector, divided by its norm, into the state; if it changed, into the buffer."""
    i = first + tl.arange(0, BLOCK)
    x = (tl.load(source + i, mask=i < end, other=0.0).to(DTYPE) / norm).to(target.dtype.element_ty)
    tl.store(state + i, x.to(DTYPE), mask=i < end)
    if UPDATE:
        tl.store(target + i, x, mask=i < end)


@triton.jit
def _scale(w_ptr, y_ptr, sigma, r, shape, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, length, _ = _known(shape, ALIGNED)
    for first in range(0, columns, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        offsets = _offsets(r, c, rows, length, ALIGNED)
        y = _load(w_ptr, offsets, r, c, rows, columns, DTYPE) / sigma
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def spectral_norm_scale_kernel(
    ws,
    us,  # out where ITERATE
    vs,  # out where ITERATE
    ys,  # out, stored as ws
    work_ptr,  # p and q of every layer
    state_ptr,  # out: u, v (as rounded in us and vs), sigma of every layer
    row_sums_ptr,
    column_sums_ptr,
    rows,
    columns,
    lengths,
    taps,
    ITERATE: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_R rows of W / sigma, and u and v."""
    layer = _layer(rows, BLOCK_R)
    shape = _matrix(layer, rows, columns, lengths, taps)
    n_rows, n_columns, _, _ = shape
    first_block = _before(rows, layer, BLOCK_R)
    block = tl.program_id(0) - first_block
    u_ptr, v_ptr = _of(us, layer), _of(vs, layer)
    state_u = state_ptr + _vectors(rows, columns, layer, 1)
    state_v = state_u + n_rows
    total = _sum(row_sums_ptr + first_block, tl.cdiv(n_rows, BLOCK_R), BLOCK_C, DTYPE)
    if ITERATE:
        sums_ptr = column_sums_ptr + _before(columns, layer, BLOCK_C)
        squares = _sum(sums_ptr, tl.cdiv(n_columns, BLOCK_C), BLOCK_C, DTYPE)
        u_norm, v_norm = _norm(total, EPS), _norm(squares, EPS)
        sigma = squares / v_norm
        u_from = work_ptr + _vectors(rows, columns, layer, 0)
        v_from = u_from + n_rows
    else:
        u_norm, v_norm, sigma = tl.full((), 1.0, DTYPE), tl.full((), 1.0, DTYPE), total
        u_from, v_from = u_ptr, v_ptr
    _copy(u_from, u_norm, u_ptr, state_u, block * BLOCK_R, n_rows, DTYPE, BLOCK_R, ITERATE)
    if block == 0:
        tl.store(state_v + n_columns, sigma)
        for first in range(0, n_columns, BLOCK_K):
            _copy(v_from, v_norm, v_ptr, state_v, first, n_columns, DTYPE, BLOCK_K, ITERATE)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    if _is_aligned(shape):
        _scale(_of(ws, layer), _of(ys, layer), sigma, r, shape, True, DTYPE, BLOCK_K)
    else:
        _scale(_of(ws, layer), _of(ys, layer), sigma, r, shape, False, DTYPE, BLOCK_K)


@triton.jit
def _inner(dy_ptr, w_ptr, r, shape, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, length, _ = _known(shape, ALIGNED)
    total = tl.zeros((r.shape[0], BLOCK_K), DTYPE)
    for first in range(0, columns, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        offsets = _offsets(r, c, rows, length, ALIGNED)
        dy = _load(dy_ptr, offsets, r, c, rows, columns, DTYPE)
        total += dy * _load(w_ptr, offsets, r, c, rows, columns, DTYPE)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def spectral_norm_inner_kernel(
    dys,  # stored as ws
    ws,
    row_sums_ptr,  # out: of every block of rows
    rows,
    columns,
    lengths,
    taps,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """<dy, W> of BLOCK_R rows."""
    layer = _layer(rows, BLOCK_R)
    shape = _matrix(layer, rows, columns, lengths, taps)
    r = (tl.program_id(0) - _before(rows, layer, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    if _is_aligned(shape):
        total = _inner(_of(dys, layer), _of(ws, layer), r, shape, True, DTYPE, BLOCK_K)
    else:
        total = _inner(_of(dys, layer), _of(ws, layer), r, shape, False, DTYPE, BLOCK_K)
    tl.store(row_sums_ptr + tl.program_id(0), total)


@triton.jit
def _gradient(
    dy_ptr,
    dw_ptr,
    u,
    v_ptr,
    sigma,
    r,
    shape,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns, length, taps = _known(shape, ALIGNED)
    for first in range(0, columns, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        offsets = _offsets(r, c, rows, length, ALIGNED)
        v = tl.load(v_ptr + _place(c, columns, taps), mask=c < columns, other=0.0)
        dw = (_load(dy_ptr, offsets, r, c, rows, columns, DTYPE) - u[:, None] * v[None, :]) / sigma
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(dw_ptr + offsets, dw.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def spectral_norm_gradient_kernel(
    dys,
    dws,  # out; both stored as W
    states,  # u, v, sigma of a layer each
    row_sums_ptr,
    rows,
    columns,
    lengths,
    taps,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_R rows of the gradient."""
    layer = _layer(rows, BLOCK_R)
    shape = _matrix(layer, rows, columns, lengths, taps)
    n_rows, n_columns, _, _ = shape
    first_block = _before(rows, layer, BLOCK_R)
    r = (tl.program_id(0) - first_block) * BLOCK_R + tl.arange(0, BLOCK_R)
    state = _of(states, layer)
    sigma = tl.load(state + n_rows + n_columns)
    inner = _sum(row_sums_ptr + first_block, tl.cdiv(n_rows, BLOCK_R), BLOCK_C, DTYPE)
    u = tl.load(state + r, mask=r < n_rows, other=0.0) * (inner / sigma)
    if _is_aligned(shape):
        _gradient(_of(dys, layer), _of(dws, layer), u, state + n_rows, sigma, r, shape, True, DTYPE, BLOCK_K)
    else:
        _gradient(_of(dys, layer), _of(dws, layer), u, state + n_rows, sigma, r, shape, False, DTYPE, BLOCK_K)
