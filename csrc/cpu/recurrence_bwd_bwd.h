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

  const auto v_dh0 = sweep.template state<const S>(a.v_dh0, P);
  const auto v_dc0 = sweep.template state<const C>(a.v_dc0, H);
  const auto a_dh_n = sweep.template state<S>(a.a_dh_n, P);
  const auto kappa = sweep.template state<C>(a.a_dc_n, H), a_c0 = sweep.template state<C>(a.a_c0, H);
  const Range own_rows = share(rows, part.member, part.members);
  for (int64_t k = own_rows.begin; k < own_rows.end; ++k) {
    sweep.copy(hbar[0] + k * P, v_dh0(k, 0), P);
    if (a.layout.active) sweep.copy(hbar[1] + k * P, v_dh0(k, 0), P);  // a row may join at any step
    sweep.copy(a_dh_n(k, 0), v_dh0(k, 0), P);
    sweep.copy(kappa(k, 0), v_dc0(k, 0), H);
    sweep.clear(a_c0(k, 0), Range{0, H});
  }
  sweep.wait();

  sweep.steps(true, [&](const Step& step) __attribute__((always_inline)) {
    const auto v_dgx = sweep.template at<const S>(a.v_dgx, step.t, 4 * H);
    const auto v_dh = sweep.template at<const S>(a.v_dh, step.t, P);
    const auto gates = sweep.template at<const S>(a.gates, step.t, 4 * H);
    const auto d_gates = sweep.template at<const S>(a.d_gates, step.t, 4 * H);
    const auto c = sweep.template at<const C>(a.c, step.t, H);
    const auto c_prev = sweep.previous_c(a.c, a.c0, step);
    const auto a_dy = sweep.template at<S>(a.a_dy, step.t, P);
    const auto a_d_gates = sweep.template at<S>(a.a_d_gates, step.t, 4 * H);
    const auto a_gates = sweep.template at<S>(a.a_gates, step.t, 4 * H);
    const auto m_bar = sweep.template at<S>(a.m_bar, step.t, H);
    const auto a_c = sweep.template at<C>(a.a_c, step.t, H), a_d_c = sweep.template at<C>(a.a_d_c, step.t, H);
    const auto a_c_prev = step.carried ? sweep.template at<C>(a.a_c, step.previous, H) : RowsAt<C>{};
    C* const hbar_next = hbar[step.write];

    auto emit_hbar = [&](V value, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
      store(hbar_next + k * P + u, value, lanes);
      store(a_dy(k, u), value, lanes);
      if (k >= step.leaving) store(a_dh_n(k, u), value, lanes);
    };

    auto pointwise = [&](C* tile, int, int64_t row, int64_t u, int n) __attribute__((always_inline)) {
      with_lanes<C>(u, H, [&](auto lanes) __attribute__((always_inline)) {
        for (int r = 0; r < n; ++r) {
          const int64_t k = row + r;
          const Gates<V> sum = load_gates<V>(tile + r * 4 * V::size, V::size, Full{});
          const Gates<V> in = load_gates_or_zero<V>(v_dgx(k, u), H, lanes);
          const Gates<V> v{sum.i + in.i, sum.f + in.f, sum.g + in.g, sum.o + in.o};
          const Gates<V> s = load_gates<V>(gates(k, u), H, lanes), ext = load_gates_or_zero<V>(d_gates(k, u), H, lanes);
          const V tanh_c = tanh_of(load<C>(c(k, u), lanes)), before = load<C>(c_prev(k, u), lanes);
          const V dm = load<C>(a_c(k, u), lanes), dc_total = load<C>(a_d_c(k, u), lanes);
          const GatesBwdBwd<V> d =
              lstm_step_bwd_bwd(s, before, tanh_c, dm, dc_total, ext, v, load<C>(kappa(k, u), lanes));
          store(kappa(k, u), d.a_dc, lanes);
          store(a_d_c(k, u), d.a_dc, lanes);
          store(a_c(k, u), d.a_c_new, lanes);
          if (k < step.carried) {
            C* const slot = a_c_prev(k, u);
            store(slot, load<C>(slot, lanes) + d.a_c_prev, lanes);
          } else {
            store(a_c0(k, u), d.a_c_prev, lanes);
          }
          store_gates(a_d_gates(k, u), H, d.a_ext, lanes);
          store_gates(a_gates(k, u), H, d.a_s, lanes);
          if (projected) {
            store(mbar + k * H + u, d.a_dm, lanes);
            store(m_bar(k, u), d.a_dm, lanes);
          } else {
            emit_hbar(d.a_dm, k, u, lanes);
          }
        }
      });
    };

    const int64_t bounds[3] = {0, step.joined, step.active};
    for (int first = 0; first < 2; ++first)
      sweep.multiply(part.hidden, hbar[step.read], first && !v_dh0 ? 0 : P, bounds[first], bounds[first + 1], pointwise);
    if (projected) {
      sweep.wait();
      sweep.multiply_flat(part.projection, mbar, H, 0, step.active,
                          [&](V sum, int64_t k, int64_t u, auto lanes) __attribute__((always_inline)) {
        emit_hbar(sum + load_or_zero<C>(v_dh(k, u), lanes), k, u, lanes);
      });
    }
    if (sweep.has_inactive_rows()) {
      const Range units = sweep.outputs(part.hidden), outputs = sweep.outputs(projected ? part.projection : part.hidden);
      for (int64_t k = step.active; k < rows; ++k) {
        sweep.clear(a_dy(k, 0), outputs);
        sweep.clear(a_d_gates(k, 0), units, 4, H);
        sweep.clear(a_gates(k, 0), units, 4, H);
        sweep.clear(m_bar(k, 0), units);
        sweep.clear(a_c(k, 0), units);
        sweep.copy(a_d_c(k, units.begin), kappa(k, units.begin), units.end - units.begin);
      }
    }
    sweep.wait();
  });
}

}  // namespace fuseblock::FB_ISA
