// lstm_gates and its derivatives of first and second order on a range of rows; see lstm_gates.h.
//
// fwd:  reads 4H gates, H c; writes H h, H c_new per row. bwd: reads 4H + H + 2H, writes 4H + H.
// bwd_bwd: reads 4H + H + 4H + H + 2H, writes 2H + 4H + H. Activations are recomputed: nothing else is saved.
// 16-bit storage is widened to float; c is either 16-bit or float.
#pragma once

#include "../math/activations.h"
#include "lstm_gates.h"
#include "simd.h"

namespace fuseblock::FB_ISA {

template <class V, class S, class Lanes>
FB_INLINE Gates<V> load_gates(const S* row, int64_t H, Lanes lanes) {
  using C = typename V::Lane;
  return {load<C>(row, lanes), load<C>(row + H, lanes), load<C>(row + 2 * H, lanes), load<C>(row + 3 * H, lanes)};
}

template <class V, class S, class Lanes>
FB_INLINE Gates<V> load_gates_or_zero(const S* row, int64_t H, Lanes lanes) {
  if (row) return load_gates<V>(row, H, lanes);
  const V zero(typename V::Lane(0));
  return {zero, zero, zero, zero};
}

template <class V, class S, class Lanes>
FB_INLINE void store_gates(S* row, int64_t H, const Gates<V>& g, Lanes lanes) {
  store(row, g.i, lanes);
  store(row + H, g.f, lanes);
  store(row + 2 * H, g.g, lanes);
  store(row + 3 * H, g.o, lanes);
}

template <class V>
FB_INLINE Gates<V> activate_gates(const Gates<V>& a) {
  V x[4] = {a.i, a.f, a.o, a.g};
  activate<3>(x);
  return {x[0], x[1], x[3], x[2]};
}

template <class V>
FB_INLINE V tanh_of(V v) {
  V x[1] = {v};
  activate<0>(x);
  return x[0];
}

template <class S>
FB_INLINE const S* at(const void* p, int64_t offset) {
  return p ? static_cast<const S*>(p) + offset : nullptr;
}

// Calls f(row, unit, lanes) for every vector of rows [begin, end).
template <class C, class F>
FB_INLINE void for_vectors(int64_t begin, int64_t end, int64_t H, F&& f) {
  for (int64_t row = begin; row < end; ++row) {
    int64_t u = 0;
    for (; u + Vec<C>::size <= H; u += Vec<C>::size) f(row, u, Full{});
    if (u < H) f(row, u, Tail{(int)(H - u)});
  }
}

template <class S, class CS>
struct GatesKernels {
  using C = Compute<S>;
  using V = Vec<C>;

  static void fwd(const cpu::GatesFwd& a, int64_t begin, int64_t end) {
    const int64_t H = a.shape.H;
    for_vectors<C>(begin, end, H, [&](int64_t row, int64_t u, auto lanes) __attribute__((always_inline)) {
      const Gates<V> s = activate_gates(load_gates<V>(at<S>(a.gates, row * 4 * H + u), H, lanes));
      const V c_new = s.f * load<C>(at<CS>(a.c, row * H + u), lanes) + s.i * s.g;
      store(static_cast<S*>(a.h) + row * H + u, s.o * tanh_of(c_new), lanes);
      store(static_cast<CS*>(a.c_new) + row * H + u, c_new, lanes);
    });
  }

  static void bwd(const cpu::GatesBwdArgs& a, int64_t begin, int64_t end) {
    const int64_t H = a.shape.H;
    for_vectors<C>(begin, end, H, [&](int64_t row, int64_t u, auto lanes) __attribute__((always_inline)) {
      const int64_t wide = row * 4 * H + u, slim = row * H + u;
      const Gates<V> s = activate_gates(load_gates<V>(at<S>(a.gates, wide), H, lanes));
      const V c = load<C>(at<CS>(a.c, slim), lanes);
      const V tanh_c = tanh_of(s.f * c + s.i * s.g);
      const V dh = load_or_zero<C>(at<S>(a.dh, slim), lanes), dc = load_or_zero<C>(at<CS>(a.dc_new, slim), lanes);
      const V zero(C(0));
      const GatesBwd<V> r = lstm_step_bwd(s, c, tanh_c, dh, dc, Gates<V>{zero, zero, zero, zero});
      store_gates(static_cast<S*>(a.dgates) + wide, H, r.delta, lanes);
      store(static_cast<CS*>(a.dc) + slim, r.dc_prev, lanes);
    });
  }

  static void bwd_bwd(const cpu::GatesBwdBwdArgs& a, int64_t begin, int64_t end) {
    const int64_t H = a.shape.H;
    for_vectors<C>(begin, end, H, [&](int64_t row, int64_t u, auto lanes) __attribute__((always_inline)) {
      const int64_t wide = row * 4 * H + u, slim = row * H + u;
      const Gates<V> s = activate_gates(load_gates<V>(at<S>(a.gates, wide), H, lanes));
      const V c = load<C>(at<CS>(a.c, slim), lanes);
      const V tanh_c = tanh_of(s.f * c + s.i * s.g);
      const V dh = load_or_zero<C>(at<S>(a.dh, slim), lanes), dc = load_or_zero<C>(at<CS>(a.dc_new, slim), lanes);
      const V dc_total = dc + dh * s.o * (V(1) - tanh_c * tanh_c), zero(C(0));
      const Gates<V> v = load_gates_or_zero<V>(at<S>(a.v_dgates, wide), H, lanes);
      const V v_dc = load_or_zero<C>(at<CS>(a.v_dc, slim), lanes);
      const GatesBwdBwd<V> r =
          lstm_step_bwd_bwd(s, c, tanh_c, dh, dc_total, Gates<V>{zero, zero, zero, zero}, v, v_dc);
      Gates<V> a_pre;
      V a_c;
      through_activation(s, c, r, a_pre, a_c);
      store(static_cast<S*>(a.a_dh) + slim, r.a_dm, lanes);
      store(static_cast<CS*>(a.a_dc_new) + slim, r.a_dc, lanes);
      store_gates(static_cast<S*>(a.a_gates) + wide, H, a_pre, lanes);
      store(static_cast<CS*>(a.a_c) + slim, a_c, lanes);
    });
  }
};

// Calls f(GatesKernels<S, CS>{}) for the types of a shape.
template <class F>
FB_INLINE void for_gates_types(const cpu::GatesShape& shape, F&& f) {
  switch (shape.dtype) {
    case DType::f32: return f(GatesKernels<float, float>{});
    case DType::f64: return f(GatesKernels<double, double>{});
    case DType::f16:
      return shape.c_storage ? f(GatesKernels<Half, Half>{}) : f(GatesKernels<Half, float>{});
    case DType::bf16:
      return shape.c_storage ? f(GatesKernels<BFloat16, BFloat16>{}) : f(GatesKernels<BFloat16, float>{});
  }
}

}  // namespace fuseblock::FB_ISA
