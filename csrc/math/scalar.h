// sigmoid, tanh, exp, expm1 and selection on scalars: what the math of this folder needs of V where V is no SIMD vector.
#pragma once

#if !defined(__CUDACC__)
#include <cmath>
#endif

#include "lstm_gates.h"

namespace fuseblock {

// exp(-x) overflows to infinity for very negative x, and 1 / infinity is the right 0; NaN stays NaN.
FB_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.f, 1.f + expf(-x));  // within 2 ulp, 0 beyond 2^126; the exact division branches, cell after cell
#else
  return 1.f / (1.f + expf(-x));
#endif
}
FB_HD double sigmoid(double x) { return 1. / (1. + exp(-x)); }
FB_HD float tanh_(float x) { return tanhf(x); }
FB_HD double tanh_(double x) { return tanh(x); }
FB_HD float exp_(float x) { return expf(x); }
FB_HD double exp_(double x) { return exp(x); }
FB_HD float expm1_(float x) { return expm1f(x); }
FB_HD double expm1_(double x) { return expm1(x); }

// `a` where z > 0 (z <= 0), else `b`; a NaN in z chooses `b`.
FB_HD float where_positive(float z, float a, float b) { return z > 0 ? a : b; }
FB_HD double where_positive(double z, double a, double b) { return z > 0 ? a : b; }
FB_HD float where_nonpositive(float z, float a, float b) { return z <= 0 ? a : b; }
FB_HD double where_nonpositive(double z, double a, double b) { return z <= 0 ? a : b; }

}  // namespace fuseblock
