// Arguments of the LSTM recurrence on the CPU: one layer, all time steps, one or two directions.
//
//   a = gx_t + h W_hh^T    i, f, o = sigmoid, g = tanh    c' = f c + i g    m = o tanh(c')    h = m or W_hr m
//
// Kernels see raw pointers; absent tensors are null. T steps, B rows, H units, P = width of h (H without projection),
// D directions; direction 1 runs t = T-1 .. 0. "State type" is float for 16-bit storage.
#pragma once

#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

// Which rows run at which step. Rows are numbered k in descending order of length, so those active at step t are
// k < active[t]; order[k] is the row's place in the tensors. Null: every row at every step, in place.
struct Layout {
  int64_t T, B, H, P, D;
  DType dtype;
  const int64_t* order;   // (B,) or null
  const int64_t* active;  // (T,) or null
  const int64_t* start;   // (T,) packed sequences: index of the first row of step t; null: step t is t * time stride
};

// A tensor over time: element (t, row, j) is data[time * t + row * b + j], or data[row * (start[t] + b) + j] if packed.
struct Series {
  void* data;
  int64_t time, row;  // strides in elements
};

struct Weights {
  const void* hh;  // (D, 4H, P)
  const void* hr;  // (D, P, H) or null
};

struct RecurrenceFwd {
  Layout layout;
  Weights weights;
  Series gx;
  const void *h0, *c0;
  Series y, gates, c;  // gates and c may be absent
  void *h_n, *c_n;
};

// dh_t = dy_t + dh_n (last active step) + delta_next W_hh, then lstm_step_bwd; see csrc/math/lstm_gates.h.
struct RecurrenceBwd {
  Layout layout;
  Weights weights;
  Series dy;
  const void *dh_n, *dc_n;
  Series d_gates, d_c, gates, c;
  const void* c0;
  Series dgx, dh;        // may be absent
  void* dh0;             // may be absent
  void* dc_carry;        // (D, B, H) state type; ends as dc0
  Series dm, dc_total;   // state type, may be absent: what the second order needs
};

// The adjoint of RecurrenceBwd, in forward order. dm and dc_total lie in a_c and a_d_c when the sweep reaches them.
struct RecurrenceBwdBwd {
  Layout layout;
  Weights weights;
  Series v_dgx;
  const void *v_dh0, *v_dc0;
  Series v_dh, d_gates, gates, c;
  const void* c0;
  Series a_dy;
  void *a_dh_n, *a_dc_n;
  Series a_d_gates, a_d_c, a_gates, a_c;
  void* a_c0;
  Series m_bar;  // with a projection only
};

// A weight matrix for tile_gemm: out_dim outputs in `blocks` blocks, K terms each.
struct PackedMatrix {
  const void* source;
  void* packed;                     // null: the products read the source (k_stride 1 only)
  int64_t outputs, K;
  int64_t output_stride, k_stride;  // of the source; one of them is 1
  int64_t vectors, blocks;          // ceil(outputs / lanes) vectors; blocks * 4 >= vectors
  bool gates;                       // a block holds the four gates of one vector of units
};

struct Barrier;
void barrier_wait(Barrier*);

// What one thread computes: rows k0 <= k < k1 of a direction, and of the output blocks its share as one of `members`.
struct Part {
  int64_t direction, k0, k1;
  int64_t member, members;
  Barrier* barrier;  // of the team that shares the rows; unused if members == 1
  void* carry;       // scratch of the team, state type
  PackedMatrix hidden;      // W_hh: gates layout (fwd, bwd_bwd) or flat and transposed (bwd)
  PackedMatrix projection;  // W_hr, or transposed (bwd); source null without projection
};

void lstm_recurrence(const RecurrenceFwd&, const Threads&);
void lstm_recurrence_bwd(const RecurrenceBwd&, const Threads&);
// `first` is the RecurrenceBwd that recomputes dm and dc_total.
void lstm_recurrence_bwd_bwd(const RecurrenceBwdBwd&, const RecurrenceBwd& first, const Threads&);

}  // namespace fuseblock::cpu
