// spectral_norm on rows of a matrix; see spectral_norm.h.
#pragma once

#include "simd.h"
#include "spectral_norm.h"

namespace fuseblock::FB_ISA {

using cpu::SpectralMatrix;

constexpr int kBlockRows = 4;  // rows that share the loads of v and of the image

template <class S>
FB_INLINE S lane_sum(Vec<S> v) {
  S sum = 0;
  for (int k = 0; k < Vec<S>::size; ++k) sum += v.raw[k];
  return sum;
}

template <class S>
struct Spectral {
  static constexpr int L = Vec<S>::size;

  // f(segment's place in v, its place in a row) of every segment of row r.
  template <class F>
  static FB_INLINE void for_segments(const SpectralMatrix& m, int64_t r, F&& f) {
    for (int64_t s = 0; s < m.segments; ++s) f(s * m.length, (s * m.rows + r) * m.length);
  }

  template <int R>
  static FB_INLINE void product_of(const SpectralMatrix& m, S* products, S* image, int64_t r) {
    const S *w = static_cast<const S*>(m.w), *v = static_cast<const S*>(m.v);
    Vec<S> sums[R];
    for (int j = 0; j < R; ++j) sums[j] = Vec<S>(S(0));
    for_segments(m, r, [&](int64_t place, int64_t row) {
      for (int64_t k = 0; k < m.length; k += L)
        with_lanes<S>(k, m.length, [&](auto lanes) {
          const Vec<S> x = load<S>(v + place + k, lanes);
          for (int j = 0; j < R; ++j) sums[j] = sums[j] + x * load<S>(w + row + j * m.length + k, lanes);
        });
    });
    for (int j = 0; j < R; ++j) products[r + j] = lane_sum(sums[j]);
    if (!image) return;
    for_segments(m, r, [&](int64_t place, int64_t row) {
      for (int64_t k = 0; k < m.length; k += L)
        with_lanes<S>(k, m.length, [&](auto lanes) {
          Vec<S> sum = load<S>(image + place + k, lanes);
          for (int j = 0; j < R; ++j)
            sum = sum + Vec<S>(products[r + j]) * load<S>(w + row + j * m.length + k, lanes);
          store(image + place + k, sum, lanes);
        });
    });
  }

  static void product(const SpectralMatrix& m, void* products, void* image, int64_t begin, int64_t end) {
    S *p = static_cast<S*>(products), *i = static_cast<S*>(image);
    if (i)
      for (int64_t k = 0; k < m.columns(); ++k) i[k] = 0;
    int64_t r = begin;
    for (; r + kBlockRows <= end; r += kBlockRows) product_of<kBlockRows>(m, p, i, r);
    for (; r < end; ++r) product_of<1>(m, p, i, r);
  }

  // f(place, lanes) of the vectors of rows [begin, end), which are contiguous in every segment.
  template <class F>
  static FB_INLINE void for_vectors(const SpectralMatrix& m, int64_t begin, int64_t end, F&& f) {
    for_segments(m, begin, [&](int64_t, int64_t place) {
      const int64_t n = (end - begin) * m.length;
      for (int64_t k = 0; k < n; k += L) with_lanes<S>(k, n, [&](auto lanes) { f(place + k, lanes); });
    });
  }

  static void scale(const SpectralMatrix& m, int64_t begin, int64_t end) {
    const S* w = static_cast<const S*>(m.w);
    S* y = static_cast<S*>(m.out);
    const Vec<S> sigma(*static_cast<const S*>(m.sigma));
    for_vectors(m, begin, end, [&](int64_t k, auto lanes) { store(y + k, load<S>(w + k, lanes) / sigma, lanes); });
  }

  static double inner(const SpectralMatrix& m, int64_t begin, int64_t end) {
    const S *w = static_cast<const S*>(m.w), *dy = static_cast<const S*>(m.dy);
    constexpr int sums = 4;  // as many additions are under way at once
    Vec<S> sum[sums];
    for (int j = 0; j < sums; ++j) sum[j] = Vec<S>(S(0));
    int j = 0;
    for_segments(m, begin, [&](int64_t, int64_t place) {
      const int64_t n = (end - begin) * m.length;
      int64_t k = 0;
      for (; k + sums * L <= n; k += sums * L)
        for (int i = 0; i < sums; ++i)
          sum[i] = sum[i] + load<S>(dy + place + k + i * L, Full{}) * load<S>(w + place + k + i * L, Full{});
      for (; k < n; k += L, j = (j + 1) % sums)
        with_lanes<S>(k, n, [&](auto lanes) {
          sum[j] = sum[j] + load<S>(dy + place + k, lanes) * load<S>(w + place + k, lanes);
        });
    });
    double total = 0;
    for (int i = 0; i < sums; ++i) total += lane_sum(sum[i]);
    return total;
  }

  static void gradient(const SpectralMatrix& m, double inner, int64_t begin, int64_t end) {
    const S *dy = static_cast<const S*>(m.dy), *u = static_cast<const S*>(m.u), *v = static_cast<const S*>(m.v);
    S* dw = static_cast<S*>(m.out);
    const S sigma = *static_cast<const S*>(m.sigma), factor = S(inner) / sigma;
    const Vec<S> scale(S(1) / sigma);
    for (int64_t r = begin; r < end; ++r) {
      const Vec<S> c(factor * u[r]);
      for_segments(m, r, [&](int64_t place, int64_t row) {
        for (int64_t k = 0; k < m.length; k += L)
          with_lanes<S>(k, m.length, [&](auto lanes) {
            store(dw + row + k, (load<S>(dy + row + k, lanes) - c * load<S>(v + place + k, lanes)) * scale, lanes);
          });
      });
    }
  }
};

template <class F>
FB_INLINE auto for_spectral_dtype(DType dtype, F&& f) {
  return dtype == DType::f64 ? f(Spectral<double>{}) : f(Spectral<float>{});
}

inline void product_any(const SpectralMatrix& m, DType t, void* products, void* image, int64_t begin, int64_t end) {
  for_spectral_dtype(t, [&](auto kernels) { kernels.product(m, products, image, begin, end); });
}
inline void scale_any(const SpectralMatrix& m, DType t, int64_t begin, int64_t end) {
  for_spectral_dtype(t, [&](auto kernels) { kernels.scale(m, begin, end); });
}
inline double inner_any(const SpectralMatrix& m, DType t, int64_t begin, int64_t end) {
  return for_spectral_dtype(t, [&](auto kernels) { return kernels.inner(m, begin, end); });
}
inline void gradient_any(const SpectralMatrix& m, DType t, double inner, int64_t begin, int64_t end) {
  for_spectral_dtype(t, [&](auto kernels) { kernels.gradient(m, inner, begin, end); });
}

constexpr cpu::SpectralKernels spectral_kernels() { return {product_any, scale_any, inner_any, gradient_any}; }

}  // namespace fuseblock::FB_ISA
