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

  const auto dc_carry = sweep.template state<C>(a.dc_carry, H);
  const auto dc_n = sweep.template state<const C>(a.dc_n, H);
  const auto dh0 = sweep.template state<S>(a.dh0, P);
  const auto dh_n = sweep.template state<const S>(a.dh_n, P);
  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    sweep.copy(dc_carry(k, 0), dc_n(k, 0), H);
    if (dh0) sweep.copy(dh0(k, 0), dh_n(k, 0), P);
  }
  sweep.wait();

  sweep.steps(false, [&](const Step& step) __attribute__((always_inline)) {
    const auto dy = sweep.template at<const S>(a.dy, step.t, P);
    const auto gates = sweep.template at<const S>(a.gates, step.t, 4 * H);
    const auto d_gates = sweep.template at<const S>(a.d_gates, step.t, 4 * H);
    const auto c = sweep.template at<const C>(a.c, step.t, H), d_c = sweep.template at<const C>(a.d_c, step.t, H);
    const auto c_prev = sweep.previous_c(a.c, a.c0, step);
    const auto dgx = sweep.template at<S>(a.dgx, step.t, 4 * H), dh_out = sweep.template at<S>(a.dh, step.t, P);
    const auto dm_out = sweep.template at<C>(a.dm, step.t, H);
    const auto dc_total_out = sweep.template at<C>(a.dc_total, step.t, H);
    C* const delta_next = delta[step.write];

    auto pointwise = [&](V dm, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      const Gates<V> s = load_gates<V>(gates(k, u), H, lanes), ext = load_gates_or_zero<V>(d_gates(k, u), H, lanes);
      const V tanh_c = tanh_of(load<C>(c(k, u), lanes));
      C* const dc = dc_carry(k, u);
      const V dc_in = load<C>(dc, lanes) + load_or_zero<C>(d_c(k, u), lanes);
      const GatesBwd<V> r = lstm_step_bwd(s, load<C>(c_prev(k, u), lanes), tanh_c, dm, dc_in, ext);
      store_gates(delta_next + k * 4 * H + u, H, r.delta, lanes);
      store(dc, r.dc_prev, lanes);
      if (dgx) store_gates(dgx(k, u), H, r.delta, lanes);
      if (dm_out) {
        store(dm_out(k, u), dm, lanes);
        store(dc_total_out(k, u), r.dc_total, lanes);
      }
    };

    // Rows that run for the first time have no delta of a later step; dh_n is theirs instead.
    const int64_t bounds[3] = {0, step.joined, step.active};
    for (int first = 0; first < 2; ++first) {
      sweep.multiply_flat(part.hidden, delta[step.read], first ? 0 : 4 * H, bounds[first], bounds[first + 1],
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        V dh = sum + load_or_zero<C>(dy(k, u), lanes);
        if (first) dh = dh + load_or_zero<C>(dh_n(k, u), lanes);
        if (!projected) return pointwise(dh, k, u, lanes);
        store(dh_row + k * P + u, dh, lanes);
        if (dh_out) store(dh_out(k, u), dh, lanes);
      });
    }
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, dh_row, P, 0, step.active, pointwise);
    }
    if (sweep.has_inactive_rows()) {
      const Range outputs = sweep.outputs(part.hidden), units = projected ? sweep.outputs(part.projection) : outputs;
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(dgx(k, 0), units, 4, H);
        sweep.clear(dh_out(k, 0), outputs);
        if (d_c)
          for (int64_t u = units.begin; u < units.end; ++u) *dc_carry(k, u) += *d_c(k, u);
      }
    }
    sweep.wait();
    if (dh0)
      sweep.multiply_flat(part.hidden, delta_next, 4 * H, step.leaving, step.active,
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        store(dh0(k, u), sum, lanes);
      });
  });
}

}  // namespace fuseblock::FB_ISA
