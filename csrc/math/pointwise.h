// The activations of the convolution blocks on scalars or SIMD vectors, with first and second derivatives.
//
//   identity    z                   relu    max(z, 0)            leaky_relu, prelu   max(z, 0) + slope min(z, 0)
//   silu        z sigmoid(z)        tanh    tanh(z)              elu                 max(z, 0) + expm1(min(z, 0))
//
// The derivative at z = 0 is that of the negative side, as in PyTorch. NaN stays NaN; relu(-infinity) is 0.
//
// V is float, double (math/scalar.h) or a vector type with arithmetic, V(scalar) and sigmoid(), tanh_(), exp_(),
// expm1_(), where_positive() and where_nonpositive() in its own namespace (csrc/cpu/simd.h, csrc/cpu/pointwise_simd.h).
#pragma once

#include "lstm_gates.h"
#ifndef FB_ISA
#include "scalar.h"
#endif

namespace fuseblock {

// In the order of NAMES of python/fuseblock/_activations.py.
enum class Activation : int { identity, relu, leaky_relu, prelu, silu, tanh, elu };

// Whether the second derivative is not zero everywhere.
constexpr FB_HD bool is_smooth(Activation a) { return a >= Activation::silu; }

// act(z). `slope` is that of leaky_relu and prelu; the others ignore it.
template <Activation A, class V>
FB_HD V act(V z, V slope) {
  if constexpr (A == Activation::identity) return z;
  else if constexpr (A == Activation::relu) return where_nonpositive(z, V(0), z);
  else if constexpr (A == Activation::leaky_relu || A == Activation::prelu) return where_positive(z, z, slope * z);
  else if constexpr (A == Activation::silu) return z * sigmoid(z);
  else if constexpr (A == Activation::tanh) return tanh_(z);
  else return where_positive(z, z, expm1_(where_positive(z, V(0), z)));
}

// act'(z) and act''(z), which share a sigmoid, a tanh or an exponential.
template <class V>
struct Curve {
  V first, second;
};

// Of the smooth activations alone.
template <Activation A, class V>
FB_HD Curve<V> act_curve(V z) {
  static_assert(is_smooth(A));
  const V one(1), two(2);
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(z), falling = one - s;
    return {s * (one + z * falling), s * falling * (two + z * (one - two * s))};
  } else if constexpr (A == Activation::tanh) {
    // 1 - tanh^2 = 4 s (1 - s) with the smaller s of the two sides does not cancel.
    const V s = sigmoid(where_positive(z, V(0) - two * z, two * z)), first = two * two * s * (one - s);
    return {first, where_positive(z, V(0) - two * first, two * first) * (one - two * s)};
  } else {
    const V e = exp_(where_positive(z, V(0), z));  // 1 where z > 0
    return {e, where_positive(V(0) - z, e, V(0))};  // 0 at z = 0, as in PyTorch
  }
}

// g act'(z), linear in g. The piecewise linear activations look at the sign of z alone.
template <Activation A, class V>
FB_HD V act_bwd(V g, V z, V slope) {
  if constexpr (A == Activation::identity) return g;
  else if constexpr (A == Activation::relu) return where_nonpositive(z, V(0), g);
  else if constexpr (A == Activation::leaky_relu || A == Activation::prelu) return where_positive(z, g, slope * g);
  else return g * act_curve<A>(z).first;
}

// min(z, 0): the derivative of prelu by its slope.
template <class V>
FB_HD V negative_part(V z) {
  return where_positive(z, V(0), z);
}

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

// Calls f with the tag of an activation that is known at run time only.
template <class F>
FB_HD void with_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::identity: return f(ActivationTag<Activation::identity>{});
    case Activation::relu: return f(ActivationTag<Activation::relu>{});
    case Activation::leaky_relu: return f(ActivationTag<Activation::leaky_relu>{});
    case Activation::prelu: return f(ActivationTag<Activation::prelu>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
    case Activation::elu: return f(ActivationTag<Activation::elu>{});
  }
}

}  // namespace fuseblock
