"""One time step of the LSTM recurrence in one launch, for any H: matrix product, gates and state together.

forward   a_t = gx_t + h_{t-1} W_hh^T, then the step of kernels/lstm_gates.py
backward  in reverse: dh_t = dy_t + delta_next W_hh;  delta_t and dc from lstm_step_bwd;  one more launch gives dh0
A program owns BLOCK_B rows, BLOCK_H units and one direction, and sums over k (forward: H; backward: 4H) in tiles of BLOCK_K:
neither pre-activations nor dh go through memory. The launches of a sequence differ in the number `step` alone, so a captured
call replays. Tensors and rounding as in kernels/lstm_recurrence.py: h is rounded to the dtype of y; c and dc are carried in
the state dtype, in c_n and dc0. Inactive rows (t >= length) carry their state and give zeros.
Bytes per step: W_hh once per tile of rows, which L2 holds; per unit, b of the dtype, s of the state: forward 6b + 2s
(10b + 3s with saved state), backward 13b + 4s.
"""

import triton
import triton.language as tl

from .activations import tanh
from .lstm_gates import load_gates, load_tile, lstm_step, lstm_step_bwd, store_gates, tile_ptrs


@triton.jit
def _products(
    row_ptrs,  # (R,) pointers to the first element of each row, which is contiguous
    column_ptrs,  # (C,) pointers to the first element of each column
    stride_k,  # between elements of a column
    n_k,
    row_mask,
    column_mask,
    PRECISION: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,  # columns are contiguous; otherwise neighbouring columns are neighbours in memory
    ALIGNED: tl.constexpr,  # what is contiguous starts at 16 bytes
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(R, C) float32: products of rows and columns, summed over n_k elements; masked ones give zeros.

    Few rows and columns keep few warps busy. PARTS > 1 makes the sum one of independent sums, each over every PARTS-th run
    of BLOCK_K elements and in warps of its own: the first dimension of a three-dimensional tl.dot.
    """
    ROWS: tl.constexpr = row_mask.shape[0]
    COLUMNS: tl.constexpr = column_mask.shape[0]
    if PARTS == 1:
        k = tl.arange(0, BLOCK_K)
        k_of_row, k_of_column = k[None, :], k[:, None]
        row_ptrs, row_mask = row_ptrs[:, None], row_mask[:, None]
        column_ptrs, column_mask = column_ptrs[None, :], column_mask[None, :]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        k_of_row, k_of_column = k[:, None, :], k[:, :, None]
        row_ptrs, row_mask = row_ptrs[None, :, None], row_mask[None, :, None]
        column_ptrs, column_mask = column_ptrs[None, None, :], column_mask[None, None, :]
        sums = tl.zeros((PARTS, ROWS, COLUMNS), tl.float32)
    row_ptrs += k_of_row
    column_ptrs += k_of_column * stride_k
    if ALIGNED and PARTS == 1:
        row_ptrs = tl.multiple_of(row_ptrs, (1, 16))
        column_ptrs = tl.multiple_of(column_ptrs, (16, 1) if K_CONTIGUOUS else (1, 16))
    elif ALIGNED:
        row_ptrs = tl.multiple_of(row_ptrs, (1, 1, 16))
        column_ptrs = tl.multiple_of(column_ptrs, (1, 16, 1) if K_CONTIGUOUS else (1, 1, 16))
    for first in range(0, n_k, PARTS * BLOCK_K):
        rows = tl.load(row_ptrs, mask=row_mask & (k_of_row < n_k - first), other=0.0)
        columns = tl.load(column_ptrs, mask=column_mask & (k_of_column < n_k - first), other=0.0)
        sums = tl.dot(rows, columns, sums, input_precision=PRECISION)
        row_ptrs += PARTS * BLOCK_K
        column_ptrs += PARTS * BLOCK_K * stride_k
    return sums if PARTS == 1 else tl.sum(sums, 0)


@triton.jit
def _steps_of_rows(lengths_ptr, first_row, row, in_batch, n_steps):
    """(BLOCK_B,): how many steps each row is active for."""
    if lengths_ptr is None:
        return tl.zeros_like(row) + n_steps
    else:
        length = tl.load(lengths_ptr + first_row + row, mask=in_batch, other=0)
        return tl.maximum(tl.minimum(length, n_steps), 0).to(tl.int32)


@triton.jit(
    do_not_specialize=["step", "n_steps", "batch"],
    do_not_specialize_on_alignment=[
        "gx_ptr", "h0_ptr", "w_hh_ptr", "lengths_ptr", "y_ptr", "h_n_ptr", "c_n_ptr", "gates_ptr", "c_ptr",
    ],
)  # fmt: skip
def lstm_recurrence_step_fwd_kernel(
    step,  # 0 ... n_steps - 1, in the order in which each direction processes its steps
    gx_ptr,  # (T, B, D*4H), any strides of T and B
    h0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 4H, H)
    lengths_ptr,  # (B,) int64, or None
    y_ptr,  # out (T, B, D*H): step t is written, the one before is read
    h_n_ptr,  # out (D, B, H): a row is written at its last active step
    c_n_ptr,  # in and out (D, B, H): c
    gates_ptr,  # out (T, B, D*4H), or None
    c_ptr,  # out (T, B, D*H), None like gates
    n_steps,
    batch,
    hidden,
    stride_gx_t,
    stride_gx_b,
    PRECISION: tl.constexpr,  # of float32 dots: "ieee" or "tf32"
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One time step of every direction."""
    direction, directions = tl.program_id(2), tl.num_programs(2)
    # Pointers of this program's first row are 64-bit scalars; offsets within its few rows fit in 32 bits.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    first_unit = tl.program_id(1) * BLOCK_H
    row = tl.arange(0, BLOCK_B)
    unit = first_unit + tl.arange(0, BLOCK_H)
    in_batch = row < batch - first_row
    mask = in_batch[:, None] & (unit < hidden)[None, :]
    stride_unit = directions * hidden  # of a row of y and c; rows of gates are four times as long
    stride_step = batch.to(tl.int64) * stride_unit
    column = direction * hidden + first_row * stride_unit
    state_offset = (direction * batch.to(tl.int64) + first_row) * hidden

    sign = 1 - 2 * direction
    t = (direction * (n_steps - 1) + sign * step).to(tl.int64)
    n_active = _steps_of_rows(lengths_ptr, first_row, row, in_batch, n_steps)
    active = t < n_active
    last = t == (1 - direction) * (n_active - 1)

    # What the product does not need is asked for before it.
    now_ptr = gx_ptr + direction * 4 * hidden + first_row * stride_gx_b + t * stride_gx_t
    IN: tl.constexpr = gx_ptr.dtype.element_ty
    x_i, x_f, x_g, x_o = load_gates(now_ptr, row, unit, stride_gx_b, hidden, mask, IN, ALIGNED)
    c_n_ptr += state_offset
    c = load_tile(c_n_ptr, row, unit, hidden, mask, tl.float32, ALIGNED)

    # A row's h is where its step before has left it; inactive rows have none and need none.
    before = y_ptr + (t - sign) * stride_step + column
    h_ptrs = tl.where(
        t == direction * (n_active - 1), h0_ptr + state_offset + row * hidden, before + row * stride_unit
    )
    # A program's columns of W_hh^T: the four gates of its first unit, of the next one, ... so that halving twice parts them.
    place = tl.arange(0, 4 * BLOCK_H)
    w_unit = first_unit + place // 4
    w_row = (direction * 4 + place % 4).to(tl.int64) * hidden + w_unit
    a = _products(
        h_ptrs, w_hh_ptr + w_row * hidden, 1, hidden, in_batch & active, w_unit < hidden,
        PRECISION, True, ALIGNED, BLOCK_K, PARTS,
    )  # fmt: skip
    a_ig, a_fo = tl.split(tl.reshape(a, (BLOCK_B, BLOCK_H, 2, 2)))
    a_i, a_g = tl.split(a_ig)
    a_f, a_o = tl.split(a_fo)
    i, f, g, o, c_new, tanh_c = lstm_step(
        a_i + x_i.to(tl.float32),
        a_f + x_f.to(tl.float32),
        a_g + x_g.to(tl.float32),
        a_o + x_o.to(tl.float32),
        c,
    )

    active = active[:, None]
    h = tl.where(active, o * tanh_c, 0.0)
    c_new = tl.where(active, c_new, c)
    offset = t * stride_step + column
    tl.store(tile_ptrs(y_ptr + offset, row, unit, stride_unit, ALIGNED), h, mask=mask)
    tl.store(tile_ptrs(c_n_ptr, row, unit, hidden, ALIGNED), c_new, mask=mask)
    h_n_ptrs = tile_ptrs(h_n_ptr + state_offset, row, unit, hidden, ALIGNED)
    tl.store(h_n_ptrs, h, mask=mask & active & last[:, None])
    if gates_ptr is not None:
        i, f = tl.where(active, i, 0.0), tl.where(active, f, 0.0)
        g, o = tl.where(active, g, 0.0), tl.where(active, o, 0.0)
        store_gates(gates_ptr + 4 * offset, i, f, g, o, row, unit, 4 * stride_unit, hidden, mask, ALIGNED)
        tl.store(tile_ptrs(c_ptr + offset, row, unit, stride_unit, ALIGNED), c_new, mask=mask)


@triton.jit(
    do_not_specialize=["step", "n_steps", "batch"],
    do_not_specialize_on_alignment=[
        "dy_ptr", "dh_n_ptr", "d_gates_ptr", "d_c_ptr", "gates_ptr", "c_ptr", "c0_ptr", "w_hh_ptr", "lengths_ptr",
        "dgx_ptr", "dh0_ptr", "dc0_ptr",
    ],
)  # fmt: skip
def lstm_recurrence_step_bwd_kernel(
    step,  # 0 ... n_steps: against the order of forward; the last launch computes dh0 alone
    dy_ptr,  # (T, B, D*H), any strides of T and B, or None
    dh_n_ptr,  # (D, B, H) or None
    d_gates_ptr,  # (T, B, D*4H) or None
    d_c_ptr,  # (T, B, D*H) or None
    gates_ptr,  # (T, B, D*4H)
    c_ptr,  # (T, B, D*H)
    c0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 4H, H)
    lengths_ptr,  # (B,) int64, or None
    dgx_ptr,  # out (T, B, D*4H): step t is written, the launch before's is read
    dh0_ptr,  # out (D, B, H)
    dc0_ptr,  # in and out (D, B, H): the gradient of c that later steps hand down
    n_steps,
    batch,
    hidden,
    stride_dy_t,
    stride_dy_b,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of one time step of every direction."""
    direction, directions = tl.program_id(2), tl.num_programs(2)
    # Pointers of this program's first row are 64-bit scalars; offsets within its few rows fit in 32 bits.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_batch = row < batch - first_row
    mask = in_batch[:, None] & (unit < hidden)[None, :]
    stride_unit = directions * hidden
    stride_gates = 4 * stride_unit
    stride_step = batch.to(tl.int64) * stride_unit
    column = direction * hidden + first_row * stride_unit
    state_offset = (direction * batch.to(tl.int64) + first_row) * hidden

    # Time runs against the order in which forward processed the steps; after the last one t is outside.
    sign = 2 * direction - 1
    t = ((1 - direction) * (n_steps - 1) + sign * step).to(tl.int64)
    n_active = _steps_of_rows(lengths_ptr, first_row, row, in_batch, n_steps)

    # What the product does not need is asked for before it; the last launch needs none of it.
    live = mask & (step < n_steps)
    now = t * stride_step + column
    OUT: tl.constexpr = dgx_ptr.dtype.element_ty
    i, f, g, o = load_gates(gates_ptr + 4 * now, row, unit, stride_gates, hidden, live, OUT, ALIGNED)
    c_new = load_tile(c_ptr + now, row, unit, stride_unit, live, tl.float32, ALIGNED)
    inner = live & (step < n_steps - 1)
    c_prev = load_tile(c_ptr + now + sign * stride_step, row, unit, stride_unit, inner, tl.float32, ALIGNED)
    if step == n_steps - 1:
        c_prev = load_tile(c0_ptr + state_offset, row, unit, hidden, mask, tl.float32, ALIGNED)
    dc0_ptr += state_offset
    dc = load_tile(dc0_ptr, row, unit, hidden, live, tl.float32, ALIGNED)

    # dh comes from delta at the row's next active step, and from dh_n where there is none.
    later = t - sign + tl.zeros_like(n_active)
    later = tl.where(direction == 1, tl.minimum(later, n_active - 1), later)
    comes = (later >= 0) & (later < n_active)
    delta_ptrs = dgx_ptr + 4 * (later * stride_step + column) + row * stride_gates
    w_ptr = w_hh_ptr + (direction * 4).to(tl.int64) * hidden * hidden
    dh = _products(
        delta_ptrs, w_ptr + unit, hidden, 4 * hidden, in_batch & comes, unit < hidden,
        PRECISION, False, ALIGNED, BLOCK_K, PARTS,
    )  # fmt: skip
    if dh_n_ptr is not None:
        ends = mask & (comes == 0)[:, None]
        dh += load_tile(dh_n_ptr + state_offset, row, unit, hidden, ends, tl.float32, ALIGNED)

    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    if step == n_steps:
        tl.store(tile_ptrs(dh0_ptr + state_offset, row, unit, hidden, ALIGNED), dh, mask=mask)
    else:
        if dy_ptr is not None:
            dy = dy_ptr + t * stride_dy_t + first_row * stride_dy_b + direction * hidden
            dh += load_tile(dy, row, unit, stride_dy_b, mask, tl.float32, ALIGNED)
        if d_c_ptr is not None:
            dc += load_tile(d_c_ptr + now, row, unit, stride_unit, mask, tl.float32, ALIGNED)
        if d_gates_ptr is not None:
            ext = d_gates_ptr + 4 * now
            e_i, e_f, e_g, e_o = load_gates(ext, row, unit, stride_gates, hidden, mask, tl.float32, ALIGNED)
        else:
            e_i, e_f, e_g, e_o = 0.0, 0.0, 0.0, 0.0
        d_i, d_f, d_g, d_o, dc_prev, dc_total = lstm_step_bwd(
            i, f, g, o, c_prev, tanh(c_new), dh, dc, e_i, e_f, e_g, e_o
        )
        active = (t < n_active)[:, None]
        d_i, d_f = tl.where(active, d_i, 0.0), tl.where(active, d_f, 0.0)
        d_g, d_o = tl.where(active, d_g, 0.0), tl.where(active, d_o, 0.0)
        dc_prev = tl.where(active, dc_prev, dc)
        store_gates(dgx_ptr + 4 * now, d_i, d_f, d_g, d_o, row, unit, stride_gates, hidden, mask, ALIGNED)
        tl.store(tile_ptrs(dc0_ptr, row, unit, hidden, ALIGNED), dc_prev, mask=mask)
