// batch_norm_act on slices of a tensor; see batch_norm_act.h.
//
// Every tensor is read once and written once per kernel. Sums are float over a few dozen vectors and double beyond, so that
// their error does not grow with the size of the batch. stats sums deviations from the mean of what came before: as long as
// that is off by about one standard deviation nothing cancels, and where it is off by more the means' own spread, which is
// added exactly (Chan, Golub and LeVeque 1979), outweighs the loss.
#pragma once

#include "../math/pointwise.h"
#include "batch_norm_act.h"
#include "bits.h"
#include "pointwise_simd.h"

namespace fuseblock::FB_ISA {

using cpu::NormResult;
using cpu::NormSlice;
using cpu::NormSums;
using cpu::NormView;

constexpr int kBlockVectors = 32;  // added up in float
constexpr int kBlockRows = 16;     // channels last: rows whose operands are loaded once
constexpr int kFirstRows = 4;      // channels last: for a first mean, since one value may be far from it

typedef double Wide __attribute__((vector_size(2 * FB_VEC_BYTES)));  // as many lanes as floats

template <class V>
FB_INLINE void add_to(double* sums, V v) {
  if constexpr (sizeof(typename V::Lane) == 8) {
    store(sums, load<double>(sums, Full{}) + v, Full{});
  } else {
    Wide w;
    __builtin_memcpy(&w, sums, sizeof w);
    w += __builtin_convertvector(v.raw, Wide);
    __builtin_memcpy(sums, &w, sizeof w);
  }
}

// v, and zero in the lanes that are not there.
template <class L>
FB_INLINE Vec<L> kept(Vec<L> v, Full) { return v; }
template <class L>
FB_INLINE Vec<L> kept(Vec<L> v, Tail tail) {
  typename Vec<L>::Bits lane;
  for (int j = 0; j < Vec<L>::size; ++j) lane[j] = j;
  return Vec<L>((typename Vec<L>::Raw)(v.bits() & (typename Vec<L>::Bits)(lane < (typename Vec<L>::Int)tail.lanes)));
}

template <class S>
struct Norm {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int lanes = V::size;

  struct Operands {
    V mean, invstd, weight, bias, slope, k[cpu::kNormCoefficients];
  };

  static FB_INLINE const C* operand(const NormView& a, int row) { return static_cast<const C*>(a.operands) + row * a.padded; }

  // Of one channel, or of the vector of channels that starts there.
  template <bool last>
  static FB_INLINE V operand_at(const NormView& a, int row, int64_t channel) {
    if constexpr (last) return load<C>(operand(a, row) + channel, Full{});
    else return V(operand(a, row)[channel]);
  }

  template <bool last>
  static FB_INLINE Operands operands(const NormView& a, int64_t channel, int coefficients) {
    Operands o;
    o.mean = operand_at<last>(a, cpu::kMean, channel);
    o.invstd = operand_at<last>(a, cpu::kInvstd, channel);
    o.weight = operand_at<last>(a, cpu::kWeight, channel);
    o.bias = operand_at<last>(a, cpu::kBias, channel);
    o.slope = operand_at<last>(a, cpu::kSlope, channel);
    for (int j = 0; j < coefficients; ++j) o.k[j] = operand_at<last>(a, cpu::kFirstCoefficient + j, channel);
    return o;
  }

  template <class Lanes>
  static FB_INLINE V at(const void* p, int64_t i, Lanes lanes) {
    return load<C>(static_cast<const S*>(p) + i, lanes);
  }
  template <class Lanes>
  static FB_INLINE V at_or_zero(const void* p, int64_t i, Lanes lanes) {
    return p ? at(p, i, lanes) : V(C(0));
  }
  template <class Lanes>
  static FB_INLINE void put(void* p, int64_t i, V v, Lanes lanes) {
    store(static_cast<S*>(p) + i, v, lanes);
  }

  struct Point {
    V xhat, z;
  };

  template <class Lanes>
  static FB_INLINE Point point(const NormView& a, const Operands& o, int64_t i, Lanes lanes) {
    Point p;
    p.xhat = (at(a.x, i, lanes) - o.mean) * o.invstd;
    if (a.mask) {
      p.z = select(read_bits(a.mask, (a.N * a.C * a.S + 7) / 8, i), V(C(1)), V(C(-1)));
    } else {
      p.z = p.xhat * o.weight + o.bias;
      if (a.residual) p.z = p.z + at(a.residual, i, lanes);
    }
    return p;
  }

  // Calls f(offset, lanes) for the vectors of elements [begin, end) of a channel, row after row.
  template <class F>
  static FB_INLINE void for_channel(const NormView& a, const NormSlice& s, F&& f) {
    for (int64_t at = s.begin; at < s.end;) {
      const int64_t n = at / a.S, first = at - n * a.S;
      const int64_t length = a.S - first < s.end - at ? a.S - first : s.end - at, base = (n * a.C + s.channel) * a.S + first;
      int64_t u = 0;
      for (; u + lanes <= length; u += lanes) f(base + u, Full{});
      if (u < length) f(base + u, Tail{(int)(length - u)});
      at += length;
    }
  }

  // Calls f(first channel, lanes, first row, end of rows) for blocks of rows and vectors of channels.
  template <class F>
  static FB_INLINE void for_blocks(const NormView& a, const NormSlice& s, int64_t rows, F&& f) {
    for (int64_t m = s.begin; m < s.end; m += rows) {
      const int64_t end = m + rows < s.end ? m + rows : s.end;
      int64_t u = 0;
      for (; u + lanes <= a.width; u += lanes) f(u, Full{}, m, end);
      if (u < a.width) f(u, Tail{(int)(a.width - u)}, m, end);
    }
  }

  // ---- sums: body(operands, offset, lanes, part) adds to K vectors ----------------------------------------------

  template <int K, class Body>
  static FB_INLINE void sum_slice(const NormView& a, const NormSlice& s, double* sums, Body&& body) {
    const V zero(C(0));
    V part[K];
    for (int k = 0; k < K; ++k) part[k] = zero;
    if (a.channels_last) {
      for_blocks(a, s, kBlockRows, [&](int64_t u, auto lanes, int64_t m, int64_t end) __attribute__((always_inline)) {
        const Operands o = operands<true>(a, u, 0);
        for (int k = 0; k < K; ++k) part[k] = zero;
        for (; m < end; ++m) body(o, m * a.width + u, lanes, part);
        for (int k = 0; k < K; ++k) add_to(sums + k * a.padded + u, part[k]);
      });
      return;
    }
    const Operands o = operands<false>(a, s.channel, 0);
    alignas(64) double wide[K][lanes] = {};
    int vectors = 0;
    const auto flush = [&]() __attribute__((always_inline)) {
      for (int k = 0; k < K; ++k) {
        add_to(wide[k], part[k]);
        part[k] = zero;
      }
      vectors = 0;
    };
    for_channel(a, s, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      body(o, i, lanes, part);
      if (++vectors == kBlockVectors) flush();
    });
    flush();
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < lanes; ++j) sums[k] += wide[k][j];
  }

  // Mean and sum of squared deviations of `n` values become those of n + more values.
  static FB_INLINE void merge(double& mean, double& squares, double n, double more, double shift, double sum, double square) {
    const double offset = sum / more, delta = shift + offset - mean;  // from this block's shift, from the mean
    mean += delta * (more / (n + more));
    squares += square - sum * offset + delta * delta * (n * more / (n + more));
  }

  static void stats(const NormView& a, const NormSlice& s, double* sums) {
    if (a.channels_last) return stats_last(a, s, sums);
    const V zero(C(0));
    double mean = 0, squares = 0;
    int64_t seen = 0, pending = 0, vectors = 0;
    C shift = 0;
    V shifts = zero, sum = zero, square = zero;
    const auto flush = [&]() __attribute__((always_inline)) {
      double total = 0, total_square = 0;
      for (int j = 0; j < lanes; ++j) total += sum.raw[j], total_square += square.raw[j];
      merge(mean, squares, (double)seen, (double)pending, shift, total, total_square);
      seen += pending;
      pending = vectors = 0;
      sum = square = zero;
    };
    for_channel(a, s, [&](int64_t i, auto l) __attribute__((always_inline)) {
      const V x = at(a.x, i, l);
      if (vectors == 0) {
        shift = seen ? (C)mean : x.raw[0];
        shifts = V(shift);
      }
      const V d = kept(x - shifts, l);
      sum = sum + d;
      square = square + d * d;
      pending += lane_count(l, lanes);
      if (++vectors == (seen ? kBlockVectors : 1)) flush();
    });
    if (pending) flush();
    sums[0] = mean;
    sums[1] = squares;
  }

  static void stats_last(const NormView& a, const NormSlice& s, double* sums) {
    const auto add = [&](int64_t u, auto l, int64_t m, int64_t end) __attribute__((always_inline)) {
      double* const mean = sums + u;
      double* const squares = sums + a.padded + u;
      const int64_t seen = m - s.begin;
      const double more = (double)(end - m);
      V shift, sum(C(0)), square(C(0));
      if (seen) for (int j = 0; j < lanes; ++j) shift.raw[j] = (C)mean[j];
      else shift = at(a.x, m++ * a.width + u, l);  // its own deviation from it is 0
      for (; m < end; ++m) {
        const V d = at(a.x, m * a.width + u, l) - shift;
        sum = sum + d;
        square = square + d * d;
      }
      for (int j = 0; j < lanes; ++j)
        merge(mean[j], squares[j], (double)seen, more, shift.raw[j], sum.raw[j], square.raw[j]);
    };
    NormSlice head = s, rest = s;
    head.end = rest.begin = s.begin + kFirstRows < s.end ? s.begin + kFirstRows : s.end;
    for_blocks(a, head, kFirstRows, add);
    for_blocks(a, rest, kBlockVectors, add);
  }

  template <Activation A, bool prelu>
  static void sum_backward(const NormView& a, const NormSlice& s, double* sums) {
    sum_slice<prelu ? 3 : 2>(a, s, sums, [&](const Operands& o, int64_t i, auto l, V* part) __attribute__((always_inline)) {
      const Point p = point(a, o, i, l);
      const V dy = at(a.dy, i, l), g = act_bwd<A>(dy, p.z, o.slope);
      part[0] = part[0] + g;
      part[1] = part[1] + g * p.xhat;
      if constexpr (prelu) part[2] = part[2] + dy * negative_part(p.z);
    });
  }

  struct Second {
    V g, h, slope;  // slope: act'(z) of a smooth activation
  };
  template <Activation A>
  static FB_INLINE Second second(V dy, V z, V slope) {
    if constexpr (is_smooth(A)) {
      const Curve<V> c = act_curve<A>(z);
      return {dy * c.first, dy * c.second, c.first};
    } else {
      return {act_bwd<A>(dy, z, slope), where_nonpositive(z, dy, V(C(0))), V(C(0))};
    }
  }

  // Of the last two sums, only those of a v_r that is there count.
  template <Activation A, bool curved>
  static void sum_second_order(const NormView& a, const NormSlice& s, double* sums) {
    sum_slice<curved ? 12 : 5>(a, s, sums, [&](const Operands& o, int64_t i, auto l, V* part) __attribute__((always_inline)) {
      const Point p = point(a, o, i, l);
      const V dy = at(a.dy, i, l), v = at_or_zero(a.v, i, l);
      const Second t = second<A>(dy, p.z, o.slope);
      part[0] = part[0] + v;
      part[1] = part[1] + v * p.xhat;
      part[2] = part[2] + t.g;
      part[3] = part[3] + t.g * p.xhat;
      part[4] = part[4] + t.g * v;
      if constexpr (curved) {
        const V h_xhat = t.h * p.xhat;
        part[5] = part[5] + t.h;
        part[6] = part[6] + h_xhat;
        part[7] = part[7] + h_xhat * p.xhat;
        part[8] = part[8] + t.h * v;
        part[9] = part[9] + h_xhat * v;
        if (a.v_r) {
          const V v_r = at(a.v_r, i, l);
          part[10] = part[10] + t.h * v_r;
          part[11] = part[11] + h_xhat * v_r;
        }
      }
    });
  }

  // ---- results: body(operands, offset, lanes) -------------------------------------------------------------------

  template <class Body>
  static FB_INLINE void apply_slice(const NormView& a, const NormSlice& s, int coefficients, Body&& body) {
    if (a.channels_last) {
      for_blocks(a, s, kBlockRows, [&](int64_t u, auto lanes, int64_t m, int64_t end) __attribute__((always_inline)) {
        const Operands o = operands<true>(a, u, coefficients);
        for (; m < end; ++m) body(o, m * a.width + u, lanes);
      });
      return;
    }
    const Operands o = operands<false>(a, s.channel, coefficients);
    for_channel(a, s, [&](int64_t i, auto lanes) __attribute__((always_inline)) { body(o, i, lanes); });
  }

  template <Activation A>
  static void forward(const NormView& a, const NormSlice& s) {
    apply_slice(a, s, 0, [&](const Operands& o, int64_t i, auto l) __attribute__((always_inline)) {
      put(a.result, i, act<A>(point(a, o, i, l).z, o.slope), l);
    });
  }

  // Rows of memory, whose bits one thread writes.
  template <Activation A>
  static void forward_with_mask(const NormView& a, int64_t begin, int64_t end) {
    const int64_t length = a.channels_last ? a.width : a.S;
    BitWriter bits(a.mask_result + begin * length / 8);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t base = row * length;
      Operands o;
      if (!a.channels_last) o = operands<false>(a, row % a.C, 0);
      const auto step = [&](int64_t u, auto l) __attribute__((always_inline)) {
        if (a.channels_last) o = operands<true>(a, u, 0);
        const V z = point(a, o, base + u, l).z;
        put(a.result, base + u, act<A>(z, o.slope), l);
        bits.push(positive_bits(z), lane_count(l, lanes));
      };
      int64_t u = 0;
      for (; u + lanes <= length; u += lanes) step(u, Full{});
      if (u < length) step(u, Tail{(int)(length - u)});
    }
    bits.finish();
  }

  template <Activation A>
  static void backward(const NormView& a, const NormSlice& s) {
    apply_slice(a, s, 3, [&](const Operands& o, int64_t i, auto l) __attribute__((always_inline)) {
      const Point p = point(a, o, i, l);
      const V g = act_bwd<A>(at(a.dy, i, l), p.z, o.slope);
      if (a.result) put(a.result, i, o.k[0] * g + (o.k[1] + o.k[2] * p.xhat), l);
      if (a.result2) put(a.result2, i, g, l);
    });
  }

  template <Activation A, bool prelu>
  static void second_order(const NormView& a, const NormSlice& s) {
    apply_slice(a, s, 9, [&](const Operands& o, int64_t i, auto l) __attribute__((always_inline)) {
      const Point p = point(a, o, i, l);
      const V dy = at(a.dy, i, l), v = at_or_zero(a.v, i, l);
      const Second t = second<A>(dy, p.z, o.slope);
      V q = o.k[0] * v + (o.k[1] + o.k[2] * p.xhat);
      if (a.v_r) q = q + at(a.v_r, i, l);
      V a_x = o.k[4] * v + o.k[5] * t.g + (o.k[7] + o.k[8] * p.xhat), a_dy;
      if constexpr (is_smooth(A) || prelu) {
        const V a_z = t.h * (prelu ? o.k[3] : q);
        a_x = a_x + o.k[6] * a_z;
        if (a.result3) put(a.result3, i, a_z, l);
      }
      if constexpr (is_smooth(A)) a_dy = q * t.slope;
      else a_dy = act_bwd<A>(q, p.z, o.slope);
      if constexpr (prelu) a_dy = a_dy + o.k[3] * negative_part(p.z);
      put(a.result, i, a_x, l);
      put(a.result2, i, a_dy, l);
    });
  }

  // ---- choices ----------------------------------------------------------------------------------------------------

  // identity and prelu are leaky_relu with slopes of their own, apart from prelu's additional sums.
  template <class F>
  static FB_INLINE void with_kind(Activation a, F&& f) {
    switch (a) {
      case Activation::relu: return f(ActivationTag<Activation::relu>{});
      case Activation::silu: return f(ActivationTag<Activation::silu>{});
      case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
      case Activation::elu: return f(ActivationTag<Activation::elu>{});
      default: return f(ActivationTag<Activation::leaky_relu>{});
    }
  }

  static void sum(const NormView& a, NormSums what, const NormSlice& s, double* sums) {
    if (what == NormSums::stats) return stats(a, s, sums);
    with_kind(a.activation, [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
      if constexpr (A == Activation::leaky_relu) {
        if (a.activation == Activation::prelu) {
          if (what == NormSums::backward) sum_backward<A, true>(a, s, sums);
          else sum_second_order<A, true>(a, s, sums);
          return;
        }
      }
      if (what == NormSums::backward) sum_backward<A, false>(a, s, sums);
      else sum_second_order<A, is_smooth(A)>(a, s, sums);
    });
  }

  static void apply(const NormView& a, NormResult what, const NormSlice& s) {
    with_kind(a.activation, [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
      if (what == NormResult::forward) return forward<A>(a, s);
      if (what == NormResult::backward) return backward<A>(a, s);
      if constexpr (A == Activation::leaky_relu) {
        if (a.activation == Activation::prelu) return second_order<A, true>(a, s);
      }
      second_order<A, false>(a, s);
    });
  }

  static void apply_with_mask(const NormView& a, int64_t begin, int64_t end) {
    if (a.activation == Activation::relu) forward_with_mask<Activation::relu>(a, begin, end);
    else forward_with_mask<Activation::leaky_relu>(a, begin, end);
  }
};

template <class F>
FB_INLINE void for_norm_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(Norm<float>{});
    case DType::f64: return f(Norm<double>{});
    case DType::f16: return f(Norm<Half>{});
    case DType::bf16: return f(Norm<BFloat16>{});
  }
}

inline void norm_sum(const NormView& a, NormSums what, const NormSlice& s, double* sums) {
  for_norm_dtype(a.dtype, [&](auto norm) { norm.sum(a, what, s, sums); });
}
inline void norm_apply(const NormView& a, NormResult what, const NormSlice& s) {
  for_norm_dtype(a.dtype, [&](auto norm) { norm.apply(a, what, s); });
}
inline void norm_apply_with_mask(const NormView& a, int64_t begin, int64_t end) {
  for_norm_dtype(a.dtype, [&](auto norm) { norm.apply_with_mask(a, begin, end); });
}

constexpr cpu::NormKernels norm_kernels() { return {FB_VEC_BYTES, norm_sum, norm_apply, norm_apply_with_mask}; }

}  // namespace fuseblock::FB_ISA
