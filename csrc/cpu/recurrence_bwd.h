// Backward sweep of the recurrence, against the direction's own order. Per step and row: reads 4H gates, 2H c, P dy,
// writes 4H delta. delta is carried in a double buffer of the compute type, dc in the output dc0.
#pragma once

#include "sweep.h"

namespace fuseblock::FB_ISA {

template <class S>
void recurrence_bwd(const cpu::RecurrenceBwd& a, const Part& part) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Sweep<S> sweep(a.layout, part);
  const int64_t H = a.layout.H, P = a.layout.P, rows = sweep.rows;
  const bool projected = part.projection.source != nullptr;
  C* const carry = static_cast<C*>(part.carry);
  C* const delta[2] = {carry, carry + rows * 4 * H};
  C* const dh_row = carry + 2 * rows * 4 * H;  // (rows, P), with a projection only

  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    sweep.copy(sweep.template state<C>(a.dc_carry, k, H, 0), sweep.template state<const C>(a.dc_n, k, H, 0), H);
    if (a.dh0) sweep.copy(sweep.template state<S>(a.dh0, k, P, 0), sweep.template state<const S>(a.dh_n, k, P, 0), P);
  }
  sweep.wait();

  sweep.steps(false, [&](const Step& step) {
    auto pointwise = [&](V dm, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      const Gates<V> s = load_gates<V>(sweep.template at<const S>(a.gates, step.t, k, 4 * H, u), H, lanes);
      const Gates<V> ext = load_gates_or_zero<V>(sweep.template at<const S>(a.d_gates, step.t, k, 4 * H, u), H, lanes);
      const V tanh_c = tanh_of(load<C>(sweep.template at<const C>(a.c, step.t, k, H, u), lanes));
      const V c_prev = load<C>(sweep.previous_c(a.c, a.c0, step, k, u), lanes);
      C* dc = sweep.template state<C>(a.dc_carry, k, H, u);
      const V dc_in = load<C>(dc, lanes) + load_or_zero<C>(sweep.template at<const C>(a.d_c, step.t, k, H, u), lanes);
      const GatesBwd<V> r = lstm_step_bwd(s, c_prev, tanh_c, dm, dc_in, ext);
      store_gates(delta[step.write] + k * 4 * H + u, H, r.delta, lanes);
      store(dc, r.dc_prev, lanes);
      if (a.dgx.data) store_gates(sweep.template at<S>(a.dgx, step.t, k, 4 * H, u), H, r.delta, lanes);
      if (a.dm.data) {
        store(sweep.template at<C>(a.dm, step.t, k, H, u), dm, lanes);
        store(sweep.template at<C>(a.dc_total, step.t, k, H, u), r.dc_total, lanes);
      }
    };

    // Rows that run for the first time have no delta of a later step; dh_n is theirs instead.
    const int64_t bounds[3] = {0, step.joined, step.active};
    for (int first = 0; first < 2; ++first) {
      sweep.multiply_flat(part.hidden, delta[step.read], first ? 0 : 4 * H, bounds[first], bounds[first + 1],
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        V dh = sum + load_or_zero<C>(sweep.template at<const S>(a.dy, step.t, k, P, u), lanes);
        if (first) dh = dh + load_or_zero<C>(sweep.template state<const S>(a.dh_n, k, P, u), lanes);
        if (!projected) return pointwise(dh, k, u, lanes);
        store(dh_row + k * P + u, dh, lanes);
        if (a.dh.data) store(sweep.template at<S>(a.dh, step.t, k, P, u), dh, lanes);
      });
    }
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, dh_row, P, 0, step.active, pointwise);
    }
    if (sweep.has_inactive_rows()) {
      const Range outputs = sweep.outputs(part.hidden), units = projected ? sweep.outputs(part.projection) : outputs;
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(sweep.template at<S>(a.dgx, step.t, k, 4 * H, 0), units, 4, H);
        sweep.clear(sweep.template at<S>(a.dh, step.t, k, P, 0), outputs);
        const C* d_c = sweep.template at<const C>(a.d_c, step.t, k, H, 0);
        C* dc = sweep.template state<C>(a.dc_carry, k, H, 0);
        if (d_c)
          for (int64_t u = units.begin; u < units.end; ++u) dc[u] += d_c[u];
      }
    }
    sweep.wait();
    if (a.dh0)
      sweep.multiply_flat(part.hidden, delta[step.write], 4 * H, step.leaving, step.active,
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        store(sweep.template state<S>(a.dh0, k, P, u), sum, lanes);
      });
  });
}

}  // namespace fuseblock::FB_ISA
