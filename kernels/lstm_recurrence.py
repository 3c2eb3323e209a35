"""The LSTM recurrence over a whole sequence in one launch, for small H: W_hh stays on chip.

forward   a_t = gx_t + h W_hh^T, then the step of kernels/lstm_gates.py
backward  in reverse: dh_t = dy_t + delta_next W_hh;  delta_t and dc from lstm_step_bwd
One program owns BLOCK_B rows of the batch in one direction and walks through all T steps, so no program waits for
another. W_hh is one (BLOCK_H, BLOCK_H) tile per gate, H padded: units beyond it have the weights of the last one and weigh
nothing for others. (With weights of zero they would be NaN where h is infinite, and so would all others be a step later.)
gx (T, B, D*4H), y (T, B, D*H), w_hh (D, 4H, H). Saved, as by every engine: gates (T, B, D*4H) activated and c (T, B, D*H),
float32 for 16-bit inputs. h is rounded to the dtype of y at each step; c, dh and dc are carried in float32. Rows are
active at t < length; inactive rows carry their state and give zeros. The next step's input is fetched before the dots.
Bytes per step and unit, b of the dtype, s of c: forward 5b, 9b + s with saved state; backward 9b + s.
Source of the idea: persistent RNNs (Diamos et al. 2016), with one block per group of rows.
"""

import triton
import triton.language as tl

from .activations import tanh
from .lstm_gates import load_gates, load_tile, lstm_step, lstm_step_bwd, store_gates, tile_ptrs


@triton.jit
def _load_weight(w_ptr, gate, rows, cols, hidden, stride_rows, stride_cols):
    """The (BLOCK_H, BLOCK_H) tile of one gate, rows padded with zeros, columns with the last one."""
    cols = tl.minimum(cols, hidden - 1)
    return tl.load(
        w_ptr + gate * hidden * hidden + rows[:, None] * stride_rows + cols[None, :] * stride_cols,
        mask=(rows < hidden)[:, None],
        other=0.0,
    )


@triton.jit(
    do_not_specialize=["n_steps", "batch"],
    do_not_specialize_on_alignment=[
        "gx_ptr", "h0_ptr", "c0_ptr", "w_hh_ptr", "lengths_ptr", "y_ptr", "h_n_ptr", "c_n_ptr", "gates_ptr", "c_ptr",
    ],
)  # fmt: skip
def lstm_recurrence_fwd_kernel(
    gx_ptr,  # (T, B, D*4H), any strides of T and B
    h0_ptr,  # (D, B, H)
    c0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 4H, H)
    lengths_ptr,  # (B,) int64, or None
    y_ptr,  # out (T, B, D*H)
    h_n_ptr,  # out (D, B, H)
    c_n_ptr,  # out (D, B, H)
    gates_ptr,  # out (T, B, D*4H), or None
    c_ptr,  # out (T, B, D*H), None like gates
    n_steps,
    batch,
    hidden,
    stride_gx_t,
    stride_gx_b,
    PRECISION: tl.constexpr,  # of float32 dots: "ieee" or "tf32"
    PREFETCH: tl.constexpr,  # fetch the next step's input early, for registers
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """All time steps of some rows and one direction."""
    direction, directions = tl.program_id(1), tl.num_programs(1)
    # Pointers of this program's first row are 64-bit scalars; offsets within its few rows fit in 32 bits.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    mask = (row < batch - first_row)[:, None] & (unit < hidden)[None, :]
    stride_unit = directions * hidden  # of a row of y and c; rows of gates are four times as long
    stride_step = batch.to(tl.int64) * stride_unit
    state_offset = (direction * batch.to(tl.int64) + first_row) * hidden

    w_ptr = w_hh_ptr + direction * 4 * hidden * hidden
    w_i = _load_weight(w_ptr, 0, unit, unit, hidden, 1, hidden)
    w_f = _load_weight(w_ptr, 1, unit, unit, hidden, 1, hidden)
    w_g = _load_weight(w_ptr, 2, unit, unit, hidden, 1, hidden)
    w_o = _load_weight(w_ptr, 3, unit, unit, hidden, 1, hidden)
    h = load_tile(h0_ptr + state_offset, row, unit, hidden, mask, y_ptr.dtype.element_ty, ALIGNED)
    c = load_tile(c0_ptr + state_offset, row, unit, hidden, mask, tl.float32, ALIGNED)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + first_row + row, mask=row < batch - first_row, other=0)[:, None]

    sign = 1 - 2 * direction
    t = (direction * (n_steps - 1)).to(tl.int64)
    gx_ptr += direction * 4 * hidden + first_row * stride_gx_b
    column = direction * hidden + first_row * stride_unit
    IN: tl.constexpr = gx_ptr.dtype.element_ty
    x_i, x_f, x_g, x_o = load_gates(
        gx_ptr + t * stride_gx_t, row, unit, stride_gx_b, hidden, mask, IN, ALIGNED
    )
    for step in range(n_steps):
        if PREFETCH:
            more = mask & (step + 1 < n_steps)
            next_ptr = gx_ptr + (t + sign) * stride_gx_t
            n_i, n_f, n_g, n_o = load_gates(next_ptr, row, unit, stride_gx_b, hidden, more, IN, ALIGNED)
        else:
            now_ptr = gx_ptr + t * stride_gx_t
            x_i, x_f, x_g, x_o = load_gates(now_ptr, row, unit, stride_gx_b, hidden, mask, IN, ALIGNED)
        a_i = tl.dot(h, w_i, x_i.to(tl.float32), input_precision=PRECISION)
        a_f = tl.dot(h, w_f, x_f.to(tl.float32), input_precision=PRECISION)
        a_g = tl.dot(h, w_g, x_g.to(tl.float32), input_precision=PRECISION)
        a_o = tl.dot(h, w_o, x_o.to(tl.float32), input_precision=PRECISION)
        i, f, g, o, c_new, tanh_c = lstm_step(a_i, a_f, a_g, a_o, c)
        h_new = (o * tanh_c).to(h.dtype)
        y = h_new
        if lengths_ptr is not None:
            active = t < length
            y = tl.where(active, h_new, 0.0)
            h_new, c_new = tl.where(active, h_new, h), tl.where(active, c_new, c)
            i, f = tl.where(active, i, 0.0), tl.where(active, f, 0.0)
            g, o = tl.where(active, g, 0.0), tl.where(active, o, 0.0)
        offset = t * stride_step + column
        tl.store(tile_ptrs(y_ptr + offset, row, unit, stride_unit, ALIGNED), y, mask=mask)
        if gates_ptr is not None:
            store_gates(gates_ptr + 4 * offset, i, f, g, o, row, unit, 4 * stride_unit, hidden, mask, ALIGNED)
            tl.store(tile_ptrs(c_ptr + offset, row, unit, stride_unit, ALIGNED), c_new, mask=mask)
        h, c = h_new, c_new
        if PREFETCH:
            x_i, x_f, x_g, x_o = n_i, n_f, n_g, n_o
        t += sign
    tl.store(tile_ptrs(h_n_ptr + state_offset, row, unit, hidden, ALIGNED), h, mask=mask)
    tl.store(tile_ptrs(c_n_ptr + state_offset, row, unit, hidden, ALIGNED), c, mask=mask)


@triton.jit(
    do_not_specialize=["n_steps", "batch"],
    do_not_specialize_on_alignment=[
        "dy_ptr", "dh_n_ptr", "dc_n_ptr", "d_gates_ptr", "d_c_ptr", "gates_ptr", "c_ptr", "c0_ptr", "w_hh_ptr",
        "lengths_ptr", "dgx_ptr", "dh0_ptr", "dc0_ptr",
    ],
)  # fmt: skip
def lstm_recurrence_bwd_kernel(
    dy_ptr,  # (T, B, D*H), any strides of T and B, or None
    dh_n_ptr,  # (D, B, H) or None
    dc_n_ptr,  # (D, B, H) or None
    d_gates_ptr,  # (T, B, D*4H) or None
    d_c_ptr,  # (T, B, D*H) or None
    gates_ptr,  # (T, B, D*4H)
    c_ptr,  # (T, B, D*H)
    c0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 4H, H)
    lengths_ptr,  # (B,) int64, or None
    dgx_ptr,  # out (T, B, D*4H)
    dh0_ptr,  # out (D, B, H)
    dc0_ptr,  # out (D, B, H)
    n_steps,
    batch,
    hidden,
    stride_dy_t,
    stride_dy_b,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of all time steps of some rows and one direction."""
    direction, directions = tl.program_id(1), tl.num_programs(1)
    # Pointers of this program's first row are 64-bit scalars; offsets within its few rows fit in 32 bits.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    mask = (row < batch - first_row)[:, None] & (unit < hidden)[None, :]
    stride_unit = directions * hidden
    stride_step = batch.to(tl.int64) * stride_unit
    state_offset = (direction * batch.to(tl.int64) + first_row) * hidden

    w_ptr = w_hh_ptr + direction * 4 * hidden * hidden
    w_i = _load_weight(w_ptr, 0, unit, unit, hidden, hidden, 1)
    w_f = _load_weight(w_ptr, 1, unit, unit, hidden, hidden, 1)
    w_g = _load_weight(w_ptr, 2, unit, unit, hidden, hidden, 1)
    w_o = _load_weight(w_ptr, 3, unit, unit, hidden, hidden, 1)
    dh = load_tile(
        dh_n_ptr + state_offset if dh_n_ptr is not None else None,
        row,
        unit,
        hidden,
        mask,
        tl.float32,
        ALIGNED,
    )
    dc = load_tile(
        dc_n_ptr + state_offset if dc_n_ptr is not None else None,
        row,
        unit,
        hidden,
        mask,
        tl.float32,
        ALIGNED,
    )
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + first_row + row, mask=row < batch - first_row, other=0)[:, None]

    # Time runs against the order in which forward processed the steps.
    sign = 2 * direction - 1
    t = ((1 - direction) * (n_steps - 1)).to(tl.int64)
    column = direction * hidden + first_row * stride_unit
    gates_ptr += 4 * column
    dgx_ptr += 4 * column
    c_ptr += column
    OUT: tl.constexpr = dgx_ptr.dtype.element_ty
    stride_gates = 4 * stride_unit
    now = gates_ptr + 4 * t * stride_step
    p_i, p_f, p_g, p_o = load_gates(now, row, unit, stride_gates, hidden, mask, OUT, ALIGNED)
    c_new = load_tile(c_ptr + t * stride_step, row, unit, stride_unit, mask, tl.float32, ALIGNED)
    for step in range(n_steps):
        more = mask & (step + 1 < n_steps)
        earlier = (t + sign) * stride_step
        if PREFETCH:
            i, f, g, o = p_i.to(tl.float32), p_f.to(tl.float32), p_g.to(tl.float32), p_o.to(tl.float32)
            p_i, p_f, p_g, p_o = load_gates(
                gates_ptr + 4 * earlier, row, unit, stride_gates, hidden, more, OUT, ALIGNED
            )
        else:
            now = gates_ptr + 4 * t * stride_step
            i, f, g, o = load_gates(now, row, unit, stride_gates, hidden, mask, tl.float32, ALIGNED)
        c_prev = load_tile(c_ptr + earlier, row, unit, stride_unit, more, tl.float32, ALIGNED)
        if step + 1 == n_steps:
            c_prev = load_tile(c0_ptr + state_offset, row, unit, hidden, mask, tl.float32, ALIGNED)
        dm = dh
        if (
            d_gates_ptr is None
        ):  # of second derivatives, for which registers are short, infinite ones may become NaN
            dm = tl.where((unit < hidden)[None, :], dh, 0.0)
        if dy_ptr is not None:
            dy = dy_ptr + t * stride_dy_t + first_row * stride_dy_b + direction * hidden
            dm += load_tile(dy, row, unit, stride_dy_b, mask, tl.float32, ALIGNED)
        if d_c_ptr is not None:
            d_c = d_c_ptr + t * stride_step + column
            dc += load_tile(d_c, row, unit, stride_unit, mask, tl.float32, ALIGNED)
        if d_gates_ptr is not None:
            ext = d_gates_ptr + 4 * (t * stride_step + column)
            e_i, e_f, e_g, e_o = load_gates(ext, row, unit, stride_gates, hidden, mask, tl.float32, ALIGNED)
        else:
            e_i, e_f, e_g, e_o = 0.0, 0.0, 0.0, 0.0
        d_i, d_f, d_g, d_o, dc_prev, dc_total = lstm_step_bwd(
            i, f, g, o, c_prev, tanh(c_new), dm, dc, e_i, e_f, e_g, e_o
        )
        if lengths_ptr is not None:
            active = t < length
            d_i, d_f = tl.where(active, d_i, 0.0), tl.where(active, d_f, 0.0)
            d_g, d_o = tl.where(active, d_g, 0.0), tl.where(active, d_o, 0.0)
            dc_prev = tl.where(active, dc_prev, dc)
            kept = tl.where(active, 0.0, dh)
        else:
            kept = tl.zeros_like(dh)
        d_i, d_f, d_g, d_o = d_i.to(OUT), d_f.to(OUT), d_g.to(OUT), d_o.to(OUT)
        store_gates(
            dgx_ptr + 4 * t * stride_step, d_i, d_f, d_g, d_o, row, unit, stride_gates, hidden, mask, ALIGNED
        )
        dh = tl.dot(d_i, w_i, kept, input_precision=PRECISION)
        dh = tl.dot(d_f, w_f, dh, input_precision=PRECISION)
        dh = tl.dot(d_g, w_g, dh, input_precision=PRECISION)
        dh = tl.dot(d_o, w_o, dh, input_precision=PRECISION)
        dc, c_new = dc_prev, c_prev
        t += sign
    tl.store(tile_ptrs(dh0_ptr + state_offset, row, unit, hidden, ALIGNED), dh, mask=mask)
    tl.store(tile_ptrs(dc0_ptr + state_offset, row, unit, hidden, ALIGNED), dc, mask=mask)
