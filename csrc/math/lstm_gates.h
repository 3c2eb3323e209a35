// One LSTM step on scalars or SIMD vectors, with its first and second derivatives.
//
//   i, f, o = sigmoid(a_i, a_f, a_o)    g = tanh(a_g)
//   c' = f*c + i*g                      m = o*tanh(c')        (h = m, or W_hr m with a projection)
//
// V is float, double or a vector type that offers + - * and overloads of sigmoid() and tanh_() found by the caller's
// namespace. The functions are written on *activated* gates, which is what the recurrence saves; lstm_gates, which
// saves pre-activations, composes them with `through_activation`. Names follow the adjoint convention of the ops:
// `d*` are gradients, `v_*` cotangents of gradients, `a_*` adjoints that the second-order sweep returns.
#pragma once

#if defined(__CUDACC__)
#define FB_HD __host__ __device__ __forceinline__
#else
#define FB_HD inline __attribute__((always_inline))
#endif

namespace fuseblock {

template <class V>
struct Gates {
  V i, f, g, o;
};

// First order. dm: gradient of m. dc: gradient of c', without m's share. ext: gradients of the activated gates
// themselves (zero unless the gates are used as outputs, as a second backward does).
template <class V>
struct GatesBwd {
  Gates<V> delta;  // gradient of the pre-activations
  V dc_total;      // gradient of c', m's share included
  V dc_prev;       // gradient of c
};

template <class V>
FB_HD GatesBwd<V> lstm_step_bwd(const Gates<V>& s, V c_prev, V tanh_c, V dm, V dc, const Gates<V>& ext) {
  GatesBwd<V> r;
  r.dc_total = dc + dm * s.o * (V(1) - tanh_c * tanh_c);
  const V di = r.dc_total * s.g + ext.i;
  const V df = r.dc_total * c_prev + ext.f;
  const V dg = r.dc_total * s.i + ext.g;
  const V d_o = dm * tanh_c + ext.o;
  r.delta.i = di * s.i * (V(1) - s.i);
  r.delta.f = df * s.f * (V(1) - s.f);
  r.delta.g = dg * (V(1) - s.g * s.g);
  r.delta.o = d_o * s.o * (V(1) - s.o);
  r.dc_prev = r.dc_total * s.f;
  return r;
}

// Second order: the adjoint of lstm_step_bwd. v: cotangents of delta. v_dc_prev: cotangent of dc_prev.
// dc_total is the value that lstm_step_bwd computed.
template <class V>
struct GatesBwdBwd {
  V a_dm, a_dc;   // adjoints of dm and dc
  Gates<V> a_ext; // adjoints of ext
  Gates<V> a_s;   // adjoints of the activated gates
  V a_c_prev, a_c_new;
};

template <class V>
FB_HD GatesBwdBwd<V> lstm_step_bwd_bwd(const Gates<V>& s, V c_prev, V tanh_c, V dm, V dc_total, const Gates<V>& ext,
                                       const Gates<V>& v, V v_dc_prev) {
  GatesBwdBwd<V> r;
  const V one = V(1), two = V(2);
  const V di = dc_total * s.g + ext.i;
  const V df = dc_total * c_prev + ext.f;
  const V dg = dc_total * s.i + ext.g;
  const V d_o = dm * tanh_c + ext.o;
  const V sech2 = one - tanh_c * tanh_c;
  const V dm_sech2 = dm * sech2, v_o = v.o * (one - s.o);

  r.a_ext.i = v.i * s.i * (one - s.i);
  r.a_ext.f = v.f * s.f * (one - s.f);
  r.a_ext.g = v.g * (one - s.g * s.g);
  r.a_ext.o = v_o * s.o;

  r.a_dc = v_dc_prev * s.f + r.a_ext.i * s.g + r.a_ext.f * c_prev + r.a_ext.g * s.i;
  r.a_dm = (r.a_dc * sech2 + v_o * tanh_c) * s.o;

  r.a_s.i = v.i * di * (one - two * s.i) + r.a_ext.g * dc_total;
  r.a_s.f = v.f * df * (one - two * s.f) + v_dc_prev * dc_total;
  r.a_s.g = v.g * dg * (V(0) - two * s.g) + r.a_ext.i * dc_total;
  r.a_s.o = v.o * d_o * (one - two * s.o) + r.a_dc * dm_sech2;

  r.a_c_prev = r.a_ext.f * dc_total;
  r.a_c_new = (v_o - two * (r.a_dc * tanh_c)) * (dm_sech2 * s.o);  // o taken out: the difference cancels
  return r;
}

// Adjoints of the pre-activations and of c, where the activated gates and c' are functions of them.
template <class V>
FB_HD void through_activation(const Gates<V>& s, V c_prev, const GatesBwdBwd<V>& r, Gates<V>& a_pre, V& a_c) {
  a_pre.i = (r.a_s.i + r.a_c_new * s.g) * s.i * (V(1) - s.i);
  a_pre.f = (r.a_s.f + r.a_c_new * c_prev) * s.f * (V(1) - s.f);
  a_pre.g = (r.a_s.g + r.a_c_new * s.i) * (V(1) - s.g * s.g);
  a_pre.o = r.a_s.o * s.o * (V(1) - s.o);
  a_c = r.a_c_prev + r.a_c_new * s.f;
}

}  // namespace fuseblock
