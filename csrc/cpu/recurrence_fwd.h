// Forward sweep of the recurrence. Per step and row: reads 4H gx, writes P y and, if saved, 4H activated gates and H c.
// The weights are packed and stay in cache; h is carried in a double buffer of the compute type, already rounded to the
// storage type; c is carried in c_n.
#pragma once

#include "sweep.h"

namespace fuseblock::FB_ISA {

template <class S>
void recurrence_fwd(const cpu::RecurrenceFwd& a, const Part& part) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Sweep<S> sweep(a.layout, part);
  const int64_t H = a.layout.H, P = a.layout.P, rows = sweep.rows;
  const bool projected = part.projection.source != nullptr;
  C* const carry = static_cast<C*>(part.carry);
  C* const h[2] = {carry, carry + rows * P};
  C* const m = carry + 2 * rows * P;  // (rows, H), with a projection only

  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    const S* h0 = sweep.template state<const S>(a.h0, k, P, 0);
    sweep.copy(h[0] + k * P, h0, P);
    if (a.layout.active) sweep.copy(h[1] + k * P, h0, P);  // a row may join at any step
    sweep.copy(sweep.template state<S>(a.h_n, k, P, 0), h0, P);
    sweep.copy(sweep.template state<C>(a.c_n, k, H, 0), sweep.template state<const C>(a.c0, k, H, 0), H);
  }
  sweep.wait();

  sweep.steps(true, [&](const Step& step) {
    auto emit_h = [&](V value, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      S* y = sweep.template at<S>(a.y, step.t, k, P, u);
      store(y, value, lanes);
      if constexpr (sizeof(S) != sizeof(C)) value = load<C>(y, lanes);
      store(h[step.write] + k * P + u, value, lanes);
      if (k >= step.leaving) store(sweep.template state<S>(a.h_n, k, P, u), value, lanes);
    };

    sweep.multiply(part.hidden, h[step.read], P, 0, step.active,
                   [&](C* tile, int, int64_t row, int64_t u, int n) __attribute__((always_inline)) {
      with_lanes<C>(u, H, [&](auto lanes) __attribute__((always_inline)) {
        // c' of N rows from their sums; c' and o stay in the tile.
        in_groups<2, 1>(n, [&](int first, auto group) __attribute__((always_inline)) {
          constexpr int N = group.size;
          V x[4 * N];  // i, f, o of each row, then every g
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) {
            const Gates<V> sum = load_gates<V>(tile + (first + r) * 4 * V::size, V::size, Full{});
            const S* at = sweep.template at<const S>(a.gx, step.t, row + first + r, 4 * H, u);
            const Gates<V> gx = load_gates<V>(at, H, lanes);
            x[3 * r] = sum.i + gx.i, x[3 * r + 1] = sum.f + gx.f, x[3 * r + 2] = sum.o + gx.o;
            x[3 * N + r] = sum.g + gx.g;
          }
          activate<3 * N>(x);
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) {
            const int64_t k = row + first + r;
            const Gates<V> s{x[3 * r], x[3 * r + 1], x[3 * N + r], x[3 * r + 2]};
            C* c = sweep.template state<C>(a.c_n, k, H, u);
            const V c_new = s.f * load<C>(c, lanes) + s.i * s.g;
            store(c, c_new, lanes);
            store(tile + (first + r) * 4 * V::size, c_new, Full{});
            store(tile + ((first + r) * 4 + 1) * V::size, s.o, Full{});
            if (a.gates.data) {
              store_gates(sweep.template at<S>(a.gates, step.t, k, 4 * H, u), H, s, lanes);
              store(sweep.template at<C>(a.c, step.t, k, H, u), c_new, lanes);
            }
          }
        });
        in_groups<4, 2, 1>(n, [&](int first, auto group) __attribute__((always_inline)) {
          constexpr int N = group.size;
          V x[N];
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) x[r] = load<C>(tile + (first + r) * 4 * V::size, Full{});
          activate<0>(x);
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) {
            const V m_row = load<C>(tile + ((first + r) * 4 + 1) * V::size, Full{}) * x[r];
            const int64_t k = row + first + r;
            if (projected) store(m + k * H + u, m_row, lanes);
            else emit_h(m_row, k, u, lanes);
          }
        });
      });
    });
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, m, H, 0, step.active, emit_h);
    }
    if (sweep.has_inactive_rows()) {
      const Range units = sweep.outputs(part.hidden), outputs = sweep.outputs(projected ? part.projection : part.hidden);
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(sweep.template at<S>(a.y, step.t, k, P, 0), outputs);
        if (!a.gates.data) continue;
        sweep.clear(sweep.template at<S>(a.gates, step.t, k, 4 * H, 0), units, 4, H);
        sweep.copy(sweep.template at<C>(a.c, step.t, k, H, units.begin),
                   sweep.template state<const C>(a.c_n, k, H, units.begin), units.end - units.begin);
      }
    }
    sweep.wait();
  });
}

}  // namespace fuseblock::FB_ISA
