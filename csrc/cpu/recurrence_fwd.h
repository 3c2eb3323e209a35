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

  const auto h0 = sweep.template state<const S>(a.h0, P);
  const auto h_n = sweep.template state<S>(a.h_n, P);
  const auto c_carry = sweep.template state<C>(a.c_n, H);
  const auto c0 = sweep.template state<const C>(a.c0, H);
  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    sweep.copy(h[0] + k * P, h0(k, 0), P);
    if (a.layout.active) sweep.copy(h[1] + k * P, h0(k, 0), P);  // a row may join at any step
    sweep.copy(h_n(k, 0), h0(k, 0), P);
    sweep.copy(c_carry(k, 0), c0(k, 0), H);
  }
  sweep.wait();

  sweep.steps(true, [&](const Step& step) __attribute__((always_inline)) {
    const auto gx = sweep.template at<const S>(a.gx, step.t, 4 * H);
    const auto y = sweep.template at<S>(a.y, step.t, P);
    const auto gates = sweep.template at<S>(a.gates, step.t, 4 * H);
    const auto c_out = sweep.template at<C>(a.c, step.t, H);
    C* const h_next = h[step.write];
    const int64_t leaving = step.leaving;

    auto emit_h = [&](V value, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      store(y(k, u), value, lanes);
      if constexpr (sizeof(S) != sizeof(C)) value = load<C>(y(k, u), lanes);
      store(h_next + k * P + u, value, lanes);
      if (k >= leaving) store(h_n(k, u), value, lanes);
    };

    sweep.multiply(part.hidden, h[step.read], P, 0, step.active,
                   [&](C* tile, int, int64_t row, int64_t u, int n) __attribute__((always_inline)) {
      with_lanes<C>(u, H, [&](auto lanes) __attribute__((always_inline)) {
        for (int r = 0; r < n; ++r) {
          const int64_t k = row + r;
          const Gates<V> sum = load_gates<V>(tile + r * 4 * V::size, V::size, Full{});
          const Gates<V> in = load_gates<V>(gx(k, u), H, lanes);
          const Gates<V> s = activate_gates(Gates<V>{sum.i + in.i, sum.f + in.f, sum.g + in.g, sum.o + in.o});
          C* const c = c_carry(k, u);
          const V c_new = s.f * load<C>(c, lanes) + s.i * s.g;
          store(c, c_new, lanes);
          if (gates) {
            store_gates(gates(k, u), H, s, lanes);
            store(c_out(k, u), c_new, lanes);
          }
          const V out = s.o * tanh_of(c_new);
          if (projected) store(m + k * H + u, out, lanes);
          else emit_h(out, k, u, lanes);
        }
      });
    });
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, m, H, 0, step.active, emit_h);
    }
    if (sweep.has_inactive_rows()) {
      const Range units = sweep.outputs(part.hidden), outputs = sweep.outputs(projected ? part.projection : part.hidden);
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(y(k, 0), outputs);
        if (!gates) continue;
        sweep.clear(gates(k, 0), units, 4, H);
        sweep.copy(c_out(k, units.begin), c_carry(k, units.begin), units.end - units.begin);
      }
    }
    sweep.wait();
  });
}

}  // namespace fuseblock::FB_ISA
