// exp, sigmoid and tanh on SIMD vectors, accurate to about 2 ulp of the lane type.
//
//   e^x = s (1 + p)    s = 2^n, n = round(x / ln 2), p = expm1(x - n ln 2) as a polynomial
//   sigmoid(x) = 1 / (1 + e^-x)
//   tanh(x) = m / (m + 2) with m = expm1(2|x|) = s p + (s - 1), so that small arguments keep their relative accuracy
//
// V needs: V::Lane, arithmetic, min(bound, v) and max(bound, v) that pass a NaN in v on, quotient(), copy_sign(),
// abs(), zero_below() and pow2_bits() (see csrc/cpu/simd.h). NaN stays NaN and infinities reach the exact limits;
// sigmoid below the smallest normal number is flushed to 0.
#pragma once

#include "lstm_gates.h"

namespace fuseblock {

template <class Lane>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;  // n * ln2_hi is exact for |n| < 2^15
  static constexpr float magic = 12582912.f + 127.f;  // adding it rounds to an integer and biases the exponent
  static constexpr float sigmoid_max = 87.f, sigmoid_zero = -87.f, tanh_max = 10.f;
  static constexpr float poly[] = {0.5f, 0.16666576845993976f, 0.041666554437685939f, 0.0083632029715758549f,
                                   0.0013926213466332443f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744. + 1023.;
  static constexpr double sigmoid_max = 708., sigmoid_zero = -708., tanh_max = 20.;
  static constexpr double poly[] = {0.5,
                                    0.16666666666666671008,
                                    0.041666666666666669767,
                                    0.0083333333333261120526,
                                    0.0013888888888883731828,
                                    0.00019841269874901259234,
                                    0.000024801587325605322782,
                                    2.7557255297969644392e-6,
                                    2.7557273570102139673e-7,
                                    2.5105259538448493419e-8,
                                    2.0914717341716375952e-9};
};

// e^x = scale * (1 + p); |x| must be within the exponent range.
template <class V>
FB_HD void exp_parts(V x, V& scale, V& p) {
  using K = ExpConstants<typename V::Lane>;
  constexpr int terms = sizeof(K::poly) / sizeof(K::poly[0]);
  const V shifted = x * V(K::log2e) + V(K::magic);
  const V n = shifted - V(K::magic);
  const V r = (x - n * V(K::ln2_hi)) - n * V(K::ln2_lo);
  V q = V(K::poly[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) q = q * r + V(K::poly[k]);
  p = (r * r) * q + r;
  scale = pow2_bits(shifted);
}

template <class V>
FB_HD V sigmoid(V x) {
  using K = ExpConstants<typename V::Lane>;
  const V limited = max(V(-K::sigmoid_max), min(V(K::sigmoid_max), x));
  V scale, p;
  exp_parts(V(0) - limited, scale, p);
  return zero_below(x, V(K::sigmoid_zero), quotient(V(1), scale * p + (scale + V(1))));
}

template <class V>
FB_HD V tanh_(V x) {
  using K = ExpConstants<typename V::Lane>;
  const V twice = min(V(2 * K::tanh_max), abs(x) + abs(x));
  V scale, p;
  exp_parts(twice, scale, p);
  const V m = scale * p + (scale - V(1));
  return copy_sign(quotient(m, m + V(2)), x);
}

}  // namespace fuseblock
