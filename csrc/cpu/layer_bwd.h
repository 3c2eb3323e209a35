// Backward pass of a whole layer over one thread's rows; see lstm_layer.h. For a few steps at a time:
//
//   delta_t = as in recurrence_bwd.h    dx = delta W_ih    [dW_ih | dW_hh] += delta^T [x, h_prev]    db += sum of delta
//
// Per step and row: reads I x, 4H gates, 2H c, H y, H dy; writes I dx. Sums are kept per thread in the compute type, and
// added up by layer_finish in the order of the threads.
#pragma once

#include "layer_fwd.h"

namespace fuseblock::FB_ISA {

constexpr int kOuterVecs = FB_VEC_BYTES == 64 ? 5 : 2;  // 4 x 5 sums, 5 vectors of z and a broadcast in 32 registers

// sums[g][v] += sum over rows of delta[row][g] * z[row][v], for all `columns` g (a multiple of 4) and NV vectors v.
template <class C, int NV>
__attribute__((noinline)) void outer_sum(int64_t rows, int64_t columns, const C* __restrict delta, const C* __restrict z,
                                         int64_t stride, C* __restrict sums) {
  using V = Vec<C>;
  for (int64_t g = 0; g < columns; g += 4) {
    V acc[4][NV];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 5
      for (int v = 0; v < NV; ++v) acc[r][v] = V(C(0));
    for (int64_t row = 0; row < rows; ++row) {
      V zv[NV];
#pragma GCC unroll 5
      for (int v = 0; v < NV; ++v) {
        zv[v] = load<C>(z + row * stride + v * V::size, Full{});
        FB_PIN(zv[v].raw);
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const V d(delta[row * columns + g + r]);
#pragma GCC unroll 5
        for (int v = 0; v < NV; ++v) acc[r][v] = acc[r][v] + d * zv[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 5
      for (int v = 0; v < NV; ++v) {
        C* const out = sums + (g + r) * stride + v * V::size;
        store(out, load<C>(out, Full{}) + acc[r][v], Full{});
      }
  }
}

template <class C>
inline void outer_sums(int64_t rows, int64_t columns, const C* delta, const C* z, int64_t stride, C* sums) {
  const int64_t vectors = stride / Vec<C>::size, blocks = (vectors + kOuterVecs - 1) / kOuterVecs;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = vectors * b / blocks, at = first * Vec<C>::size;
    switch (vectors * (b + 1) / blocks - first) {
      case 1: outer_sum<C, 1>(rows, columns, delta, z + at, stride, sums + at); break;
      case 2: outer_sum<C, 2>(rows, columns, delta, z + at, stride, sums + at); break;
#if FB_VEC_BYTES == 64
      case 3: outer_sum<C, 3>(rows, columns, delta, z + at, stride, sums + at); break;
      case 4: outer_sum<C, 4>(rows, columns, delta, z + at, stride, sums + at); break;
      case 5: outer_sum<C, 5>(rows, columns, delta, z + at, stride, sums + at); break;
#endif
    }
  }
}

// to[j] += sum over rows of from[row][j], j < n.
template <class C>
inline void column_sums(int64_t rows, int64_t n, const C* from, C* to) {
  for (int64_t u = 0; u < n; u += Vec<C>::size)
    with_lanes<C>(u, n, [&](auto lanes) __attribute__((always_inline)) {
      Vec<C> sum(C(0));
      for (int64_t row = 0; row < rows; ++row) sum = sum + load<C>(from + row * n + u, lanes);
      store(to + u, load<C>(to + u, lanes) + sum, lanes);
    });
}

// part: rows of one direction, at most kLayerRows.
template <class S>
void layer_bwd_rows(const cpu::LayerBwd& a, const cpu::LayerWorker& w, const Part& part) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Layout& layout = a.layer.layout;
  const Sweep<S> sweep(layout, part);
  const int64_t H = layout.H, I = a.layer.I, rows = sweep.rows, Z = cpu::layer_sums_stride(a.layer, V::size);
  const int64_t most = cpu::kLayerRows / rows, steps = most < layout.T ? most : layout.T;
  C* const delta = static_cast<C*>(w.scratch);        // (1 + steps, rows, 4H); the first is left by the steps before
  C* const z = delta + (1 + steps) * rows * 4 * H;    // (steps, rows, Z): [x, h_prev, 0]
  int64_t places[cpu::kLayerRows];                    // of the rows of z in x; -1: not active
  C* const sums = static_cast<C*>(w.sums);
  __builtin_memset(delta, 0, rows * 4 * H * sizeof(C));
  __builtin_memset(z, 0, steps * rows * Z * sizeof(C));

  const auto dc_carry = sweep.template state<C>(a.dc0, H);
  const auto dc_n = sweep.template state<const C>(a.dc_n, H);
  const auto dh0 = sweep.template state<S>(a.dh0, H);
  const auto dh_n = sweep.template state<const S>(a.dh_n, H), h0 = sweep.template state<const S>(a.h0, H);
  for (int64_t k = 0; k < rows; ++k) sweep.copy(dc_carry(k, 0), dc_n(k, 0), H);

  const auto finish_steps = [&](int64_t n) {
    const C* const found = delta + rows * 4 * H;
    outer_sums<C>(n, 4 * H, found, z, Z, sums);
    column_sums<C>(n, 4 * H, found, sums + 4 * H * Z);
    if (!a.dx) return;
    sweep.multiply_flat(w.input, found, 4 * H, 0, n,
                        [&](V sum, int64_t row, int64_t u, auto lanes) __attribute__((always_inline)) {
      if (places[row] < 0) return;
      if (part.direction == 0) store(static_cast<S*>(a.dx) + places[row] * I + u, sum, lanes);
      else store(static_cast<C*>(a.dx_reverse) + places[row] * I + u, sum, lanes);
    });
  };

  int64_t slot = 0, done = 0;
  sweep.steps(false, [&](const Step& step) __attribute__((always_inline)) {
    const auto dy = sweep.template at<const S>(a.dy, step.t, H);
    const auto gates = sweep.template at<const S>(a.gates, step.t, 4 * H);
    const auto c = sweep.template at<const C>(a.c, step.t, H);
    const auto c_prev = sweep.previous_c(a.c, a.c0, step);
    const auto h_prev = step.carried ? sweep.template at<const S>(a.y, step.previous, H) : RowsAt<const S>{};
    C *const before = delta + slot * rows * 4 * H, *const now = before + rows * 4 * H;

    sweep.multiply_flat(w.hidden, before, 4 * H, 0, step.active,
                        [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      V dh = sum + load_or_zero<C>(dy(k, u), lanes);
      if (k >= step.joined) dh = dh + load_or_zero<C>(dh_n(k, u), lanes);
      const V zero(C(0));
      C* const dc = dc_carry(k, u);
      const GatesBwd<V> r = lstm_step_bwd(load_gates<V>(gates(k, u), H, lanes), load<C>(c_prev(k, u), lanes),
                                          tanh_of(load<C>(c(k, u), lanes)), dh, load<C>(dc, lanes),
                                          Gates<V>{zero, zero, zero, zero});
      store_gates(now + k * 4 * H + u, H, r.delta, lanes);
      store(dc, r.dc_prev, lanes);
    });
    __builtin_memset(now + step.active * 4 * H, 0, (rows - step.active) * 4 * H * sizeof(C));
    if (step.leaving < step.active)
      sweep.multiply_flat(w.hidden, now, 4 * H, step.leaving, step.active,
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        store(dh0(k, u), sum, lanes);
      });

    const int64_t place = (layout.start ? layout.start[step.t] : step.t * layout.B) + part.k0;
    const S* x_row = layer_input_rows<S>(a.layer, step.t, part.k0);
    C* to = z + slot * rows * Z;
    for (int64_t k = 0; k < rows; ++k, x_row += a.layer.x.row, to += Z) {
      places[slot * rows + k] = k < step.active ? place + k : -1;
      if (k >= step.active) continue;
      sweep.copy(to, x_row, I);
      sweep.copy(to + I, k < step.carried ? h_prev(k, 0) : h0(k, 0), H);
    }
    ++slot, ++done;
    if (slot == steps || done == layout.T) {
      finish_steps(slot * rows);
      __builtin_memcpy(delta, delta + slot * rows * 4 * H, rows * 4 * H * sizeof(C));
      slot = 0;
    }
  });
}

template <class S>
void layer_bwd(const cpu::LayerBwd& a, const cpu::LayerWorker& w) {
  using C = Compute<S>;
  const int64_t Z = cpu::layer_sums_stride(a.layer, Vec<C>::size);
  __builtin_memset(w.sums, 0, 4 * a.layer.layout.H * (Z + 1) * sizeof(C));
  for_row_blocks(w, [&](const Part& part) { layer_bwd_rows<S>(a, w, part); });
}

// Rows [begin, end) of the weight gradients of a direction, from the sums of its workers, which lie `distance` bytes apart.
template <class S>
void layer_finish(const cpu::LayerBwd& a, int64_t direction, const void* first, int64_t workers, int64_t distance,
                  int64_t begin, int64_t end) {
  using C = Compute<S>;
  const int64_t H = a.layer.layout.H, I = a.layer.I, Z = cpu::layer_sums_stride(a.layer, Vec<C>::size);
  const auto add_up = [&](S* to, int64_t from, int64_t n) {
    for (int64_t u = 0; u < n; u += Vec<C>::size)
      with_lanes<C>(u, n, [&](auto lanes) __attribute__((always_inline)) {
        Vec<C> sum(C(0));
        for (int64_t k = 0; k < workers; ++k)
          sum = sum + load<C>(reinterpret_cast<const C*>(static_cast<const char*>(first) + k * distance) + from + u, lanes);
        store(to + u, sum, lanes);
      });
  };
  for (int64_t g = begin; g < end; ++g) {
    add_up(static_cast<S*>(a.dw_ih[direction]) + g * I, g * Z, I);
    add_up(static_cast<S*>(a.dw_hh[direction]) + g * H, g * Z + I, H);
  }
  if (a.db[direction]) add_up(static_cast<S*>(a.db[direction]) + begin, 4 * H * Z + begin, end - begin);
}

// Elements [begin, end) of dx, both directions together.
template <class S>
void layer_add_dx(const cpu::LayerBwd& a, int64_t begin, int64_t end) {
  using C = Compute<S>;
  for (int64_t u = begin; u < end; u += Vec<C>::size)
    with_lanes<C>(u, end, [&](auto lanes) __attribute__((always_inline)) {
      S* const to = static_cast<S*>(a.dx) + u;
      store(to, load<C>(to, lanes) + load<C>(static_cast<const C*>(a.dx_reverse) + u, lanes), lanes);
    });
}

}  // namespace fuseblock::FB_ISA
