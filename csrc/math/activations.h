// exp, sigmoid and tanh on SIMD vectors, accurate to about 2 ulp of the lane type.
//
//   e^x = s (1 + p)    s = 2^n, n = round(x / ln 2), p = expm1(x - n ln 2) as a polynomial
//   sigmoid(x) = 1 / (1 + e^-x)
//   tanh(x) = m / (m + 2) with m = expm1(2|x|) = s p + (s - 1), so that small arguments keep their relative accuracy
//
// V needs: V::Lane, arithmetic, min(bound, v) and max(bound, v) that pass a NaN in v on, copy_sign(), abs(),
// pow2_bits(), and quotients<S>(d), which turns d[j] into 1 / d[j] for j < S and d[j] / (d[j] + 2) for the others (see
// csrc/cpu/simd.h). NaN stays NaN; infinities reach the exact limits where subnormal numbers are flushed to 0.
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
  static constexpr float exp_max = 88.3f, tanh_max = 10.f;  // 1 / (1 + e^exp_max) is subnormal
  static constexpr float poly[] = {0.5f, 0.16666576845993976f, 0.041666554437685939f, 0.0083632029715758549f,
                                   0.0013926213466332443f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744. + 1023.;
  static constexpr double exp_max = 709.4, tanh_max = 20.;
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

// e^x = scale * (1 + p) for each x[j]; |x| must be within the exponent range. The chains of N vectors are interleaved
// step by step: one chain alone waits four cycles for every instruction, and a core's scheduler does not look far enough
// ahead to overlap chains that are written one after the other.
template <int N, class V>
FB_HD void exp_parts(const V (&x)[N], V (&scale)[N], V (&p)[N]) {
  using K = ExpConstants<typename V::Lane>;
  constexpr int terms = sizeof(K::poly) / sizeof(K::poly[0]);
  V shifted[N], r[N];
#define FB_EACH _Pragma("GCC unroll 16") for (int j = 0; j < N; ++j)
  FB_EACH shifted[j] = x[j] * V(K::log2e) + V(K::magic);
  FB_EACH r[j] = shifted[j] - V(K::magic);
  FB_EACH scale[j] = x[j] - r[j] * V(K::ln2_hi);
  FB_EACH r[j] = scale[j] - r[j] * V(K::ln2_lo);
  FB_EACH p[j] = V(K::poly[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) {
    FB_EACH p[j] = p[j] * r[j] + V(K::poly[k]);
  }
  FB_EACH scale[j] = r[j] * r[j];
  FB_EACH p[j] = scale[j] * p[j] + r[j];
  FB_EACH scale[j] = pow2_bits(shifted[j]);
}

// sigmoid of the first S vectors, tanh of the others, in place.
template <int S, int N, class V>
FB_HD void activate(V (&x)[N]) {
  using K = ExpConstants<typename V::Lane>;
  V limited[N], scale[N], p[N];
  FB_EACH limited[j] = j < S ? -max(V(-K::exp_max), min(V(K::exp_max), x[j]))
                             : min(V(2 * K::tanh_max), abs(x[j]) + abs(x[j]));
  exp_parts(limited, scale, p);
  FB_EACH p[j] = scale[j] * p[j] + (j < S ? scale[j] + V(1) : scale[j] - V(1));
  quotients<S>(p);
  FB_EACH x[j] = j < S ? p[j] : copy_sign(p[j], x[j]);
#undef FB_EACH
}

}  // namespace fuseblock
