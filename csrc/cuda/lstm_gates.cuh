// LSTM step kernels: one thread does N neighbouring units of one row.
//
//   forward    a (4H), c -> s = sigmoid/tanh(a), c' = f c + i g, m = o tanh(c')
//   backward   and second order: math/lstm_gates.h; kSaved says that activated gates and c' come from memory (recurrence),
//              otherwise both are recomputed from pre-activations and c (lstm_gates)
//
// Bytes per unit, 16-bit T, float C: forward 18 (+8 with saved gates); lstm_gates backward 30, second order 48.
// Arithmetic is in the state dtype. Memory bound: each operand is read and written once, 16 bytes a time where the sizes
// allow it. Shapes, dtypes and absent operands: lstm_gates.h.
#pragma once

#include "cuda/lstm_gates.h"
#include "cuda/vector.h"

namespace fuseblock {

// Small blocks: the widest kernels take up to 144 registers a thread, and three blocks still fit on a multiprocessor.
inline constexpr int kLstmStepThreads = 128;

// Where this thread works. threadIdx.x, blockIdx.y: units; threadIdx.y, blockIdx.x: rows.
template <int N>
struct LstmStepPlace {
  int64_t row, unit;
  bool inside, active;

  __device__ explicit LstmStepPlace(const LstmStepShape& shape) {
    row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    unit = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    inside = row < shape.rows && unit < shape.hidden;
    active = inside && (shape.lengths == nullptr || shape.t < shape.lengths[row]);
  }
};

// N units of each gate.
template <class T, int N>
struct GateVecs {
  Vec<T, N> i, f, g, o;

  FB_HD Gates<State<T>> operator[](int n) const { return {i[n], f[n], g[n], o[n]}; }
  FB_HD void set(int n, const Gates<State<T>>& x) {
    i.set(n, x.i);
    f.set(n, x.f);
    g.set(n, x.g);
    o.set(n, x.o);
  }
};

template <class T, int N>
FB_HD GateVecs<T, N> load_gates(const Rows& rows, int64_t row, int64_t unit, int64_t hidden) {
  return {load<T, N>(rows, row, unit), load<T, N>(rows, row, unit + hidden), load<T, N>(rows, row, unit + 2 * hidden),
          load<T, N>(rows, row, unit + 3 * hidden)};
}

template <class T, int N>
FB_HD GateVecs<T, N> zero_gates() {
  return {zeros<T, N>(), zeros<T, N>(), zeros<T, N>(), zeros<T, N>()};
}

template <class T, int N>
FB_HD GateVecs<T, N> load_gates_or_zeros(const Rows& rows, int64_t row, int64_t unit, int64_t hidden) {
  return rows.data == nullptr ? zero_gates<T, N>() : load_gates<T, N>(rows, row, unit, hidden);
}

template <class T, int N>
FB_HD void store_gates_if_given(const Rows& rows, int64_t row, int64_t unit, int64_t hidden, const GateVecs<T, N>& x) {
  if (rows.data == nullptr) return;
  store(rows, row, unit, x.i);
  store(rows, row, unit + hidden, x.f);
  store(rows, row, unit + 2 * hidden, x.g);
  store(rows, row, unit + 3 * hidden, x.o);
}

template <class V>
FB_HD Gates<V> activate(const Gates<V>& a) {
  return {sigmoid(a.i), sigmoid(a.f), tanh_(a.g), sigmoid(a.o)};
}

template <class T, class C, int N>
__global__ void __launch_bounds__(kLstmStepThreads) lstm_step_fwd_kernel(const LstmStepFwd step) {
  using S = State<T>;
  const int64_t hidden = step.shape.hidden;
  const LstmStepPlace<N> at(step.shape);
  if (!at.inside) return;
  const Vec<C, N> c_prev = load<C, N>(step.c_prev, at.row, at.unit);
  if (!at.active) {
    store(step.h, at.row, at.unit, zeros<T, N>());
    store(step.c, at.row, at.unit, c_prev);
    store_gates_if_given(step.acts, at.row, at.unit, hidden, zero_gates<T, N>());
    return;
  }
  GateVecs<T, N> gates = load_gates<T, N>(step.pre, at.row, at.unit, hidden);
  Vec<C, N> c;
  Vec<T, N> m;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Gates<S> s = activate(gates[n]);
    const S c_new = s.f * S(c_prev[n]) + s.i * s.g;
    c.set(n, c_new);
    m.set(n, s.o * tanh_(c_new));
    gates.set(n, s);
  }
  store(step.h, at.row, at.unit, m);
  store(step.c, at.row, at.unit, c);
  store_gates_if_given(step.acts, at.row, at.unit, hidden, gates);
  store_if_given(step.h_state, at.row, at.unit, m);
}

template <class T, class C, int N, bool kSaved>
__global__ void __launch_bounds__(kLstmStepThreads) lstm_step_bwd_kernel(const LstmStepBwd step) {
  using S = State<T>;
  const int64_t hidden = step.shape.hidden;
  const LstmStepPlace<N> at(step.shape);
  if (!at.inside) return;
  const Vec<T, N> dm = load_or_zeros<T, N>(step.dm, at.row, at.unit);
  const Vec<C, N> dc = load_or_zeros<C, N>(step.dc, at.row, at.unit);
  const Vec<C, N> d_c = load_or_zeros<C, N>(step.d_c, at.row, at.unit);
  Vec<C, N> dc_prev, dc_total;
  if (!at.active) {
#pragma unroll
    for (int n = 0; n < N; ++n) dc_prev.set(n, S(dc[n]) + S(d_c[n]));
    store_gates_if_given(step.delta, at.row, at.unit, hidden, zero_gates<T, N>());
    store(step.dc_prev, at.row, at.unit, dc_prev);
    store_if_given(step.dc_total, at.row, at.unit, dc_prev);
    store_if_given(step.dm_keep, at.row, at.unit, dm);
    return;
  }
  const GateVecs<T, N> gates = load_gates<T, N>(step.gates, at.row, at.unit, hidden);
  const GateVecs<T, N> ext = load_gates_or_zeros<T, N>(step.ext, at.row, at.unit, hidden);
  const Vec<T, N> dy = load_or_zeros<T, N>(step.dy, at.row, at.unit);
  const Vec<C, N> c_prev = load<C, N>(step.c_prev, at.row, at.unit);
  const Vec<C, N> c = load_or_zeros<C, N>(step.c, at.row, at.unit);
  GateVecs<T, N> delta;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Gates<S> s = kSaved ? gates[n] : activate(gates[n]);
    const S c_new = kSaved ? S(c[n]) : s.f * S(c_prev[n]) + s.i * s.g;
    const GatesBwd<S> r =
        lstm_step_bwd(s, S(c_prev[n]), tanh_(c_new), S(dm[n] + dy[n]), S(dc[n]) + S(d_c[n]), ext[n]);
    delta.set(n, r.delta);
    dc_prev.set(n, r.dc_prev);
    dc_total.set(n, r.dc_total);
  }
  store_gates_if_given(step.delta, at.row, at.unit, hidden, delta);
  store(step.dc_prev, at.row, at.unit, dc_prev);
  store_if_given(step.dc_total, at.row, at.unit, dc_total);
  store_if_given(step.dm_keep, at.row, at.unit, zeros<T, N>());
}

template <class T, class C, int N, bool kSaved>
__global__ void __launch_bounds__(kLstmStepThreads) lstm_step_bwd_bwd_kernel(const LstmStepBwdBwd step) {
  using S = State<T>;
  const int64_t hidden = step.shape.hidden;
  const LstmStepPlace<N> at(step.shape);
  if (!at.inside) return;
  const Vec<C, N> v_dc_prev = load_or_zeros<C, N>(step.v_dc_prev, at.row, at.unit);
  if (!at.active) {
    store(step.a_dm, at.row, at.unit, zeros<T, N>());
    store(step.a_dc, at.row, at.unit, v_dc_prev);
    store_gates_if_given(step.a_ext, at.row, at.unit, hidden, zero_gates<T, N>());
    store_gates_if_given(step.a_gates, at.row, at.unit, hidden, zero_gates<T, N>());
    store_if_given(step.a_c, at.row, at.unit, zeros<C, N>());
    return;
  }
  const GateVecs<T, N> gates = load_gates<T, N>(step.gates, at.row, at.unit, hidden);
  const GateVecs<T, N> ext = load_gates_or_zeros<T, N>(step.ext, at.row, at.unit, hidden);
  const GateVecs<T, N> v = load_gates_or_zeros<T, N>(step.v, at.row, at.unit, hidden);
  const Vec<T, N> dm = load_or_zeros<T, N>(step.dm, at.row, at.unit);
  const Vec<C, N> dc = load_or_zeros<C, N>(step.dc, at.row, at.unit);
  const Vec<C, N> c_prev = load<C, N>(step.c_prev, at.row, at.unit);
  const Vec<C, N> c = load_or_zeros<C, N>(step.c, at.row, at.unit);
  // Only the recurrence accumulates: the slot of c_prev already holds what the step before placed there.
  Vec<C, N> a_c_prev = kSaved ? load<C, N>(step.a_c_prev, at.row, at.unit) : zeros<C, N>();
  GateVecs<T, N> a_gates, a_ext;
  Vec<T, N> a_dm;
  Vec<C, N> a_dc, a_c;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Gates<S> s = kSaved ? gates[n] : activate(gates[n]);
    const S c_old = c_prev[n];
    const S tanh_c = tanh_(kSaved ? S(c[n]) : s.f * c_old + s.i * s.g);
    const S dc_total = kSaved ? S(dc[n]) : lstm_step_bwd(s, c_old, tanh_c, S(dm[n]), S(dc[n]), ext[n]).dc_total;
    const GatesBwdBwd<S> r = lstm_step_bwd_bwd(s, c_old, tanh_c, S(dm[n]), dc_total, ext[n], v[n], S(v_dc_prev[n]));
    a_dm.set(n, r.a_dm);
    a_dc.set(n, r.a_dc);
    if constexpr (kSaved) {
      a_ext.set(n, r.a_ext);
      a_gates.set(n, r.a_s);
      a_c.set(n, r.a_c_new);
      a_c_prev.set(n, S(a_c_prev[n]) + r.a_c_prev);
    } else {
      Gates<S> a_pre;
      S a_c_old;
      through_activation(s, c_old, r, a_pre, a_c_old);
      a_gates.set(n, a_pre);
      a_c_prev.set(n, a_c_old);
    }
  }
  store(step.a_dm, at.row, at.unit, a_dm);
  store(step.a_dc, at.row, at.unit, a_dc);
  store(step.a_c_prev, at.row, at.unit, a_c_prev);
  store_gates_if_given(step.a_gates, at.row, at.unit, hidden, a_gates);
  store_if_given(step.a_dm_state, at.row, at.unit, a_dm);
  if constexpr (kSaved) {
    store_gates_if_given(step.a_ext, at.row, at.unit, hidden, a_ext);
    store_if_given(step.a_c, at.row, at.unit, a_c);
  }
}

}  // namespace fuseblock
