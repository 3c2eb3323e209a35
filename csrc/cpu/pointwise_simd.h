// What csrc/math/pointwise.h needs of a SIMD vector beyond simd.h: sigmoid, tanh, exp and expm1 to about 2 ulp.
#pragma once

#include "../math/activations.h"
#include "../math/pointwise.h"
#include "simd.h"

namespace fuseblock::FB_ISA {

template <class L>
FB_INLINE Vec<L> sigmoid(Vec<L> z) {
  Vec<L> x[1] = {z};
  activate<1>(x);
  return x[0];
}

template <class L>
FB_INLINE Vec<L> tanh_(Vec<L> z) {
  Vec<L> x[1] = {z};
  activate<0>(x);
  return x[0];
}

// e^z for z <= 0.
template <class L>
FB_INLINE Vec<L> exp_(Vec<L> z) {
  const Vec<L> x[1] = {max(Vec<L>(-ExpConstants<L>::exp_max), z)};
  Vec<L> scale[1], p[1];
  exp_parts(x, scale, p);
  return scale[0] + scale[0] * p[0];
}

// e^z - 1 for z <= 0.
template <class L>
FB_INLINE Vec<L> expm1_(Vec<L> z) {
  const Vec<L> x[1] = {max(Vec<L>(-ExpConstants<L>::tanh_max * L(2)), z)};  // e^x is 0 beside 1 below that
  Vec<L> scale[1], p[1];
  exp_parts(x, scale, p);
  return scale[0] * p[0] + (scale[0] - Vec<L>(1));
}

}  // namespace fuseblock::FB_ISA
