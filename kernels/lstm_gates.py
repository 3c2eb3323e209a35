"""One LSTM step on (rows, 4H) gates and (rows, H) cell states, gate order i, f, g, o.

forward   i, f, o = sigmoid(a)   g = tanh(a)   c' = f c + i g   m = o tanh(c')
backward  dc' += dm o (1 - tanh(c')^2);  da from dc' and dm;  dc = dc' f.   second order: the adjoint of backward
Equations and names are those of csrc/math/lstm_gates.h. Two users: the op lstm_gates saves the pre-activations and
recomputes the rest (FROM_PRE); the recurrence saves activated gates and cell states, and masks rows by `lengths`.
Mathematics in float32 (float64 for double). NaN travels; inactive rows are selected, never multiplied by zero.
Bytes per unit, b of the gates' dtype, s of c's: forward 5b + 2s (9b + 2s with saved gates), backward 9b + 3s (+ s for c'),
second order at most 18b + 6s. Pointers may be None where a kernel tests them; outputs may be the inputs that they name.
ALIGNED promises that every row of every tile starts at 16 bytes.
"""

import triton
import triton.language as tl

from .activations import sigmoid, tanh


@triton.jit
def lstm_step(a_i, a_f, a_g, a_o, c_prev):
    """(i, f, g, o, c', tanh(c')) of pre-activations."""
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c_new = f * c_prev + i * g
    return i, f, g, o, c_new, tanh(c_new)


@triton.jit
def lstm_step_bwd(i, f, g, o, c_prev, tanh_c, dm, dc, ext_i, ext_f, ext_g, ext_o):
    """(delta_i, delta_f, delta_g, delta_o, dc_prev, dc_total)."""
    dc_total = dc + dm * o * (1.0 - tanh_c * tanh_c)
    delta_i = (dc_total * g + ext_i) * i * (1.0 - i)
    delta_f = (dc_total * c_prev + ext_f) * f * (1.0 - f)
    delta_g = (dc_total * i + ext_g) * (1.0 - g * g)
    delta_o = (dm * tanh_c + ext_o) * o * (1.0 - o)
    return delta_i, delta_f, delta_g, delta_o, dc_total * f, dc_total


@triton.jit
def tile_ptrs(ptr, row, col, stride_row, ALIGNED: tl.constexpr):
    """Pointers of a (rows, columns) tile."""
    ptrs = ptr + (row[:, None] * stride_row + col[None, :])
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    return ptrs


@triton.jit
def load_tile(ptr, row, col, stride_row, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A (rows, columns) tile; zeros where ptr is None."""
    if ptr is None:
        return tl.zeros(mask.shape, DTYPE)
    else:
        return tl.load(tile_ptrs(ptr, row, col, stride_row, ALIGNED), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_gates(ptr, row, col, stride_row, hidden, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The four tiles i, f, g, o; zeros where ptr is None."""
    if ptr is None:
        zero = tl.zeros(mask.shape, DTYPE)
        return zero, zero, zero, zero
    else:
        i = load_tile(ptr, row, col, stride_row, mask, DTYPE, ALIGNED)
        f = load_tile(ptr + hidden, row, col, stride_row, mask, DTYPE, ALIGNED)
        g = load_tile(ptr + 2 * hidden, row, col, stride_row, mask, DTYPE, ALIGNED)
        o = load_tile(ptr + 3 * hidden, row, col, stride_row, mask, DTYPE, ALIGNED)
        return i, f, g, o


@triton.jit
def store_gates(ptr, i, f, g, o, row, col, stride_row, hidden, mask, ALIGNED: tl.constexpr):
    """Write the four tiles i, f, g, o."""
    tl.store(tile_ptrs(ptr, row, col, stride_row, ALIGNED), i, mask=mask)
    tl.store(tile_ptrs(ptr + hidden, row, col, stride_row, ALIGNED), f, mask=mask)
    tl.store(tile_ptrs(ptr + 2 * hidden, row, col, stride_row, ALIGNED), g, mask=mask)
    tl.store(tile_ptrs(ptr + 3 * hidden, row, col, stride_row, ALIGNED), o, mask=mask)


@triton.jit
def _tile(rows, hidden, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """(row, col, mask) of this program's tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    return row, col, (row < rows)[:, None] & (col < hidden)[None, :]


@triton.jit
def _active_rows(lengths_ptr, row, rows, t):
    """(rows, 1) bool: the rows that are active at step t."""
    return (tl.load(lengths_ptr + row, mask=row < rows, other=0) > t)[:, None]


_DO_NOT_SPECIALIZE = ["rows", "t"]


@triton.jit(
    do_not_specialize=_DO_NOT_SPECIALIZE,
    do_not_specialize_on_alignment=[
        "pre_ptr", "c_ptr", "h_ptr", "c_new_ptr", "acts_ptr", "lengths_ptr", "h_state_ptr",
    ],
)  # fmt: skip
def lstm_gates_fwd_kernel(
    pre_ptr,  # (rows, 4H) pre-activations
    c_ptr,  # (rows, H)
    h_ptr,  # out (rows, H)
    c_new_ptr,  # out (rows, H); may be c
    acts_ptr,  # out (rows, 4H) activated gates, or None; may be pre
    h_state_ptr,  # out (rows, H), or None: written in active rows only
    lengths_ptr,  # (rows,) int64, or None: rows are active where t < length; others give h = acts = 0, c' = c
    rows,
    hidden,
    t,
    stride_pre,
    stride_c,
    stride_h,
    stride_c_new,
    stride_acts,
    stride_h_state,
    DTYPE: tl.constexpr,  # of the mathematics
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Activate the gates and update the cell state."""
    row, col, mask = _tile(rows, hidden, BLOCK_R, BLOCK_H)
    a_i, a_f, a_g, a_o = load_gates(pre_ptr, row, col, stride_pre, hidden, mask, DTYPE, ALIGNED)
    c_prev = load_tile(c_ptr, row, col, stride_c, mask, DTYPE, ALIGNED)
    i, f, g, o, c_new, tanh_c = lstm_step(a_i, a_f, a_g, a_o, c_prev)
    m = o * tanh_c
    if lengths_ptr is not None:
        active = _active_rows(lengths_ptr, row, rows, t)
        i, f, g, o = (
            tl.where(active, i, 0.0),
            tl.where(active, f, 0.0),
            tl.where(active, g, 0.0),
            tl.where(active, o, 0.0),
        )
        m, c_new = tl.where(active, m, 0.0), tl.where(active, c_new, c_prev)
        if h_state_ptr is not None:
            tl.store(tile_ptrs(h_state_ptr, row, col, stride_h_state, ALIGNED), m, mask=mask & active)
    tl.store(tile_ptrs(h_ptr, row, col, stride_h, ALIGNED), m, mask=mask)
    tl.store(tile_ptrs(c_new_ptr, row, col, stride_c_new, ALIGNED), c_new, mask=mask)
    if acts_ptr is not None:
        store_gates(acts_ptr, i, f, g, o, row, col, stride_acts, hidden, mask, ALIGNED)


@triton.jit(
    do_not_specialize=_DO_NOT_SPECIALIZE,
    do_not_specialize_on_alignment=[
        "gates_ptr", "c_ptr", "c_new_ptr", "dm_ptr", "dy_ptr", "dc_ptr", "d_c_ptr", "ext_ptr", "lengths_ptr",
        "delta_ptr", "dc_prev_ptr", "dm_keep_ptr", "dc_total_ptr",
    ],
)  # fmt: skip
def lstm_gates_bwd_kernel(
    gates_ptr,  # (rows, 4H): pre-activations if FROM_PRE, else activated gates
    c_ptr,  # (rows, H)
    c_new_ptr,  # (rows, H), or None if FROM_PRE
    dm_ptr,  # (rows, H) or None; the gradient of m is dm + dy
    dy_ptr,  # (rows, H) or None; ignored in inactive rows
    dc_ptr,  # (rows, H) or None; the gradient of c' is dc + d_c
    d_c_ptr,  # (rows, H) or None
    ext_ptr,  # (rows, 4H) or None: gradient of the activated gates
    delta_ptr,  # out (rows, 4H) or None: gradient of the pre-activations
    dc_prev_ptr,  # out (rows, H); may be dc
    dm_keep_ptr,  # out (rows, H) or None: dm in inactive rows, 0 in active ones; may be dm
    dc_total_ptr,  # out (rows, H) or None; may be d_c
    lengths_ptr,  # (rows,) int64, or None; inactive rows give delta = 0, dc_prev = dc_total = dc + d_c
    rows,
    hidden,
    t,
    stride_gates,
    stride_c,
    stride_c_new,
    stride_dm,
    stride_dy,
    stride_dc,
    stride_d_c,
    stride_ext,
    stride_delta,
    stride_dc_prev,
    stride_dm_keep,
    stride_dc_total,
    FROM_PRE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """First-order gradients of the step."""
    row, col, mask = _tile(rows, hidden, BLOCK_R, BLOCK_H)
    i, f, g, o = load_gates(gates_ptr, row, col, stride_gates, hidden, mask, DTYPE, ALIGNED)
    c_prev = load_tile(c_ptr, row, col, stride_c, mask, DTYPE, ALIGNED)
    if FROM_PRE:
        i, f, g, o, c_new, tanh_c = lstm_step(i, f, g, o, c_prev)
    else:
        tanh_c = tanh(load_tile(c_new_ptr, row, col, stride_c_new, mask, DTYPE, ALIGNED))
    carried = load_tile(dm_ptr, row, col, stride_dm, mask, DTYPE, ALIGNED)
    dm = carried + load_tile(dy_ptr, row, col, stride_dy, mask, DTYPE, ALIGNED)
    dc = load_tile(dc_ptr, row, col, stride_dc, mask, DTYPE, ALIGNED)
    dc += load_tile(d_c_ptr, row, col, stride_d_c, mask, DTYPE, ALIGNED)
    ext_i, ext_f, ext_g, ext_o = load_gates(ext_ptr, row, col, stride_ext, hidden, mask, DTYPE, ALIGNED)
    d_i, d_f, d_g, d_o, dc_prev, dc_total = lstm_step_bwd(
        i, f, g, o, c_prev, tanh_c, dm, dc, ext_i, ext_f, ext_g, ext_o
    )
    if lengths_ptr is not None:
        active = _active_rows(lengths_ptr, row, rows, t)
        d_i, d_f = tl.where(active, d_i, 0.0), tl.where(active, d_f, 0.0)
        d_g, d_o = tl.where(active, d_g, 0.0), tl.where(active, d_o, 0.0)
        dc_prev, dc_total = tl.where(active, dc_prev, dc), tl.where(active, dc_total, dc)
        if dm_keep_ptr is not None:
            kept = tl.where(active, 0.0, carried)
            tl.store(tile_ptrs(dm_keep_ptr, row, col, stride_dm_keep, ALIGNED), kept, mask=mask)
    if delta_ptr is not None:
        store_gates(delta_ptr, d_i, d_f, d_g, d_o, row, col, stride_delta, hidden, mask, ALIGNED)
    tl.store(tile_ptrs(dc_prev_ptr, row, col, stride_dc_prev, ALIGNED), dc_prev, mask=mask)
    if dc_total_ptr is not None:
        tl.store(tile_ptrs(dc_total_ptr, row, col, stride_dc_total, ALIGNED), dc_total, mask=mask)


@triton.jit(
    do_not_specialize=_DO_NOT_SPECIALIZE,
    do_not_specialize_on_alignment=[
        "gates_ptr", "c_ptr", "c_new_ptr", "dm_ptr", "dc_ptr", "ext_ptr", "v_ptr", "v_dc_prev_ptr", "lengths_ptr",
        "a_dm_ptr", "a_dc_ptr", "a_ext_ptr", "a_gates_ptr", "a_c_ptr", "a_c_new_ptr", "a_dm_state_ptr",
    ],
)  # fmt: skip
def lstm_gates_bwd_bwd_kernel(
    gates_ptr,  # (rows, 4H): pre-activations if FROM_PRE, else activated gates
    c_ptr,  # (rows, H)
    c_new_ptr,  # (rows, H), or None if FROM_PRE
    dm_ptr,  # (rows, H) or None: the whole gradient of m
    dc_ptr,  # (rows, H) or None: gradient of c', without m's share if FROM_PRE, with it (dc_total) otherwise
    ext_ptr,  # (rows, 4H) or None
    v_ptr,  # (rows, 4H) or None: cotangent of delta
    v_dc_prev_ptr,  # (rows, H) or None: cotangent of dc_prev
    a_dm_ptr,  # out (rows, H)
    a_dc_ptr,  # out (rows, H); may be v_dc_prev
    a_ext_ptr,  # out (rows, 4H) or None; may be v
    a_gates_ptr,  # out (rows, 4H): adjoint of what gates_ptr holds
    a_c_ptr,  # out (rows, H): adjoint of c if FROM_PRE; otherwise a_c_prev is ADDED
    a_c_new_ptr,  # out (rows, H), or None if FROM_PRE
    a_dm_state_ptr,  # out (rows, H) or None: a_dm, written in active rows only
    lengths_ptr,  # (rows,) int64, or None; inactive rows give zeros but a_dc = v_dc_prev
    rows,
    hidden,
    t,
    stride_gates,
    stride_c,
    stride_c_new,
    stride_dm,
    stride_dc,
    stride_ext,
    stride_v,
    stride_v_dc_prev,
    stride_a_dm,
    stride_a_dc,
    stride_a_ext,
    stride_a_gates,
    stride_a_c,
    stride_a_c_new,
    stride_a_dm_state,
    FROM_PRE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adjoint of the backward kernel."""
    row, col, mask = _tile(rows, hidden, BLOCK_R, BLOCK_H)
    i, f, g, o = load_gates(gates_ptr, row, col, stride_gates, hidden, mask, DTYPE, ALIGNED)
    c_prev = load_tile(c_ptr, row, col, stride_c, mask, DTYPE, ALIGNED)
    dm = load_tile(dm_ptr, row, col, stride_dm, mask, DTYPE, ALIGNED)
    dc_total = load_tile(dc_ptr, row, col, stride_dc, mask, DTYPE, ALIGNED)
    if FROM_PRE:
        i, f, g, o, c_new, tanh_c = lstm_step(i, f, g, o, c_prev)
        sech2 = 1.0 - tanh_c * tanh_c
        dc_total += dm * o * sech2
    else:
        tanh_c = tanh(load_tile(c_new_ptr, row, col, stride_c_new, mask, DTYPE, ALIGNED))
        sech2 = 1.0 - tanh_c * tanh_c
    ext_i, ext_f, ext_g, ext_o = load_gates(ext_ptr, row, col, stride_ext, hidden, mask, DTYPE, ALIGNED)
    v_i, v_f, v_g, v_o = load_gates(v_ptr, row, col, stride_v, hidden, mask, DTYPE, ALIGNED)
    kappa = load_tile(v_dc_prev_ptr, row, col, stride_v_dc_prev, mask, DTYPE, ALIGNED)

    slope_i, slope_f, slope_g, slope_o = i * (1.0 - i), f * (1.0 - f), 1.0 - g * g, o * (1.0 - o)
    a_ext_i, a_ext_f, a_ext_g, a_ext_o = v_i * slope_i, v_f * slope_f, v_g * slope_g, v_o * slope_o
    a_dc = kappa * f + a_ext_i * g + a_ext_f * c_prev + a_ext_g * i
    a_dm = a_dc * o * sech2 + a_ext_o * tanh_c
    a_i = v_i * (dc_total * g + ext_i) * (1.0 - 2.0 * i) + a_ext_g * dc_total
    a_f = v_f * (dc_total * c_prev + ext_f) * (1.0 - 2.0 * f) + kappa * dc_total
    a_g = v_g * (dc_total * i + ext_g) * (-2.0 * g) + a_ext_i * dc_total
    a_o = v_o * (dm * tanh_c + ext_o) * (1.0 - 2.0 * o) + a_dc * dm * sech2
    a_c = a_ext_f * dc_total
    a_c_new = (a_ext_o * dm - 2.0 * a_dc * dm * o * tanh_c) * sech2
    if FROM_PRE:
        # The activated gates and c' are functions of the pre-activations and c.
        a_i = (a_i + a_c_new * g) * slope_i
        a_f = (a_f + a_c_new * c_prev) * slope_f
        a_g = (a_g + a_c_new * i) * slope_g
        a_o = a_o * slope_o
        a_c = a_c + a_c_new * f
    if lengths_ptr is not None:
        active = _active_rows(lengths_ptr, row, rows, t)
        a_dm, a_dc = tl.where(active, a_dm, 0.0), tl.where(active, a_dc, kappa)
        a_ext_i, a_ext_f = tl.where(active, a_ext_i, 0.0), tl.where(active, a_ext_f, 0.0)
        a_ext_g, a_ext_o = tl.where(active, a_ext_g, 0.0), tl.where(active, a_ext_o, 0.0)
        a_i, a_f = tl.where(active, a_i, 0.0), tl.where(active, a_f, 0.0)
        a_g, a_o = tl.where(active, a_g, 0.0), tl.where(active, a_o, 0.0)
        a_c, a_c_new = tl.where(active, a_c, 0.0), tl.where(active, a_c_new, 0.0)
        if a_dm_state_ptr is not None:
            tl.store(
                tile_ptrs(a_dm_state_ptr, row, col, stride_a_dm_state, ALIGNED), a_dm, mask=mask & active
            )

    tl.store(tile_ptrs(a_dm_ptr, row, col, stride_a_dm, ALIGNED), a_dm, mask=mask)
    tl.store(tile_ptrs(a_dc_ptr, row, col, stride_a_dc, ALIGNED), a_dc, mask=mask)
    if a_ext_ptr is not None:
        store_gates(
            a_ext_ptr, a_ext_i, a_ext_f, a_ext_g, a_ext_o, row, col, stride_a_ext, hidden, mask, ALIGNED
        )
    store_gates(a_gates_ptr, a_i, a_f, a_g, a_o, row, col, stride_a_gates, hidden, mask, ALIGNED)
    if not FROM_PRE:
        a_c += load_tile(a_c_ptr, row, col, stride_a_c, mask, DTYPE, ALIGNED)
        tl.store(tile_ptrs(a_c_new_ptr, row, col, stride_a_c_new, ALIGNED), a_c_new, mask=mask)
    tl.store(tile_ptrs(a_c_ptr, row, col, stride_a_c, ALIGNED), a_c, mask=mask)
