// Second-order sweep of the recurrence, in the direction's own order: the adjoint of recurrence_bwd.
//
//   V_t = v_dgx_t + W_hh hbar_{t-1}      r = lstm_step_bwd_bwd(..., V_t, kappa_{t-1})      kappa_t = r.a_dc
//   hbar_t = r.a_dm, or W_hr r.a_dm + v_dh_t
//
// On entry a_c holds dm and a_d_c holds dc_total of every active step; each slot is read before it is overwritten.
// Per step and row: reads 12H + 3H c (+ P), writes 8H gates, 3H states, P. kappa is carried in a_dc_n.
#pragma once

#include "sweep.h"

namespace fuseblock::FB_ISA {

template <class S>
void recurrence_bwd_bwd(const cpu::RecurrenceBwdBwd& a, const Part& part) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Sweep<S> sweep(a.layout, part);
  const int64_t H = a.layout.H, P = a.layout.P, rows = sweep.rows;
  const bool projected = part.projection.source != nullptr;
  C* const carry = static_cast<C*>(part.carry);
  C* const hbar[2] = {carry, carry + rows * P};
  C* const mbar = carry + 2 * rows * P;  // (rows, H), with a projection only

  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    const S* v_dh0 = sweep.template state<const S>(a.v_dh0, k, P, 0);
    sweep.copy(hbar[0] + k * P, v_dh0, P);
    if (a.layout.active) sweep.copy(hbar[1] + k * P, v_dh0, P);
    sweep.copy(sweep.template state<S>(a.a_dh_n, k, P, 0), v_dh0, P);
    sweep.copy(sweep.template state<C>(a.a_dc_n, k, H, 0), sweep.template state<const C>(a.v_dc0, k, H, 0), H);
    sweep.clear(sweep.template state<C>(a.a_c0, k, H, 0), Range{0, H});
  }
  sweep.wait();

  sweep.steps(true, [&](const Step& step) {
    auto emit_hbar = [&](V value, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      store(hbar[step.write] + k * P + u, value, lanes);
      store(sweep.template at<S>(a.a_dy, step.t, k, P, u), value, lanes);
      if (k >= step.leaving) store(sweep.template state<S>(a.a_dh_n, k, P, u), value, lanes);
    };

    auto pointwise = [&](C* tile, int, int64_t row, int64_t u, int n) __attribute__((always_inline)) {
      with_lanes<C>(u, H, [&](auto lanes) __attribute__((always_inline)) {
        for (int r = 0; r < n; ++r) {
          const int64_t k = row + r;
          const Gates<V> sum = load_gates<V>(tile + r * 4 * V::size, V::size, Full{});
          const Gates<V> v_in =
              load_gates_or_zero<V>(sweep.template at<const S>(a.v_dgx, step.t, k, 4 * H, u), H, lanes);
          const Gates<V> v{sum.i + v_in.i, sum.f + v_in.f, sum.g + v_in.g, sum.o + v_in.o};
          const Gates<V> s = load_gates<V>(sweep.template at<const S>(a.gates, step.t, k, 4 * H, u), H, lanes);
          const Gates<V> ext =
              load_gates_or_zero<V>(sweep.template at<const S>(a.d_gates, step.t, k, 4 * H, u), H, lanes);
          const V tanh_c = tanh_of(load<C>(sweep.template at<const C>(a.c, step.t, k, H, u), lanes));
          const V c_prev = load<C>(sweep.previous_c(a.c, a.c0, step, k, u), lanes);
          C* const slot_c = sweep.template at<C>(a.a_c, step.t, k, H, u);
          C* const slot_d_c = sweep.template at<C>(a.a_d_c, step.t, k, H, u);
          C* const kappa = sweep.template state<C>(a.a_dc_n, k, H, u);

          const GatesBwdBwd<V> d = lstm_step_bwd_bwd(s, c_prev, tanh_c, load<C>(slot_c, lanes),
                                                     load<C>(slot_d_c, lanes), ext, v, load<C>(kappa, lanes));
          store(kappa, d.a_dc, lanes);
          store(slot_d_c, d.a_dc, lanes);
          store(slot_c, d.a_c_new, lanes);
          if (k < step.carried) {
            C* const before = sweep.template at<C>(a.a_c, step.previous, k, H, u);
            store(before, load<C>(before, lanes) + d.a_c_prev, lanes);
          } else {
            store(sweep.template state<C>(a.a_c0, k, H, u), d.a_c_prev, lanes);
          }
          store_gates(sweep.template at<S>(a.a_d_gates, step.t, k, 4 * H, u), H, d.a_ext, lanes);
          store_gates(sweep.template at<S>(a.a_gates, step.t, k, 4 * H, u), H, d.a_s, lanes);
          if (projected) {
            store(mbar + k * H + u, d.a_dm, lanes);
            store(sweep.template at<S>(a.m_bar, step.t, k, H, u), d.a_dm, lanes);
          } else {
            emit_hbar(d.a_dm, k, u, lanes);
          }
        }
      });
    };

    const int64_t bounds[3] = {0, step.joined, step.active};
    for (int first = 0; first < 2; ++first)
      sweep.multiply(part.hidden, hbar[step.read], first && !a.v_dh0 ? 0 : P, bounds[first], bounds[first + 1],
                     pointwise);
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, mbar, H, 0, step.active,
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        emit_hbar(sum + load_or_zero<C>(sweep.template at<const S>(a.v_dh, step.t, k, P, u), lanes), k, u, lanes);
      });
    }
    if (sweep.has_inactive_rows()) {
      const Range units = sweep.outputs(part.hidden), outputs = sweep.outputs(projected ? part.projection : part.hidden);
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(sweep.template at<S>(a.a_dy, step.t, k, P, 0), outputs);
        sweep.clear(sweep.template at<S>(a.a_d_gates, step.t, k, 4 * H, 0), units, 4, H);
        sweep.clear(sweep.template at<S>(a.a_gates, step.t, k, 4 * H, 0), units, 4, H);
        sweep.clear(sweep.template at<S>(a.m_bar, step.t, k, H, 0), units);
        sweep.clear(sweep.template at<C>(a.a_c, step.t, k, H, 0), units);
        sweep.copy(sweep.template at<C>(a.a_d_c, step.t, k, H, units.begin),
                   sweep.template state<const C>(a.a_dc_n, k, H, units.begin), units.end - units.begin);
      }
    }
    sweep.wait();
  });
}

}  // namespace fuseblock::FB_ISA
