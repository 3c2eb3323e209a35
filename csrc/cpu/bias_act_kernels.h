// bias_act and its derivatives on a range of elements; see bias_act.h.
//
// Reads and writes an element, b bytes of the storage type: forward b + b and at most 2 bits; backward b + b and the bits,
// or 2b + b where x is kept; second order the same, or 3b + 2b. Arithmetic is float, or double for double.
// Sums over a channel are taken in the same pass: at most kRunVectors values of a lane in the compute type, then double.
#pragma once

#include "bias_act.h"
#include "bits.h"
#include "pointwise_simd.h"

namespace fuseblock::FB_ISA {

using cpu::BiasActSite;

constexpr int64_t kRunVectors = 16;

// What one vector adds to the (up to two) sums of its channels.
template <class V>
struct Terms {
  V first, second;
};

// Where a vector lies: the parameters of its channel, or of its channels.
template <class C, bool Periodic>
struct Place {
  int64_t at;  // the channel; the place in the period

  template <class Lanes>
  FB_INLINE Vec<C> parameter(const void* p, Lanes lanes) const {
    if (!p) return Vec<C>(C(0));
    if constexpr (Periodic) return load<C>(static_cast<const C*>(p) + at, lanes);
    else return Vec<C>(static_cast<const C*>(p)[at]);
  }
};

// Dead lanes hold whatever the mathematics made of zeros.
template <class C>
FB_INLINE Vec<C> live(Vec<C> v, Full) { return v; }
template <class C>
FB_INLINE Vec<C> live(Vec<C> v, Tail tail) {
  alignas(FB_VEC_BYTES) C lanes[Vec<C>::size] = {};
  store(lanes, v, tail);
  return load<C>(lanes, Full{});
}

template <class C>
FB_INLINE double sum_of_lanes(Vec<C> v) {
  alignas(FB_VEC_BYTES) C lanes[Vec<C>::size];
  store(lanes, v, Full{});
  for (int w = Vec<C>::size / 2; w > 0; w /= 2) {
    for (int j = 0; j < w; ++j) lanes[j] += lanes[j + w];
  }
  return lanes[0];
}

// Calls f(index, place, lanes) -> Terms for every vector of [begin, end). Sums > 0: adds the terms to sums[Sums][channels];
// periodic, it needs `scratch` for Sums * period values.
template <class C, int Sums, class F>
FB_INLINE void sweep_channels(const BiasActSite& s, int64_t begin, int64_t end, double* sums, F&& f) {
  using V = Vec<C>;
  if (begin >= end) return;  // there may be no channels
  int64_t next = begin / s.inner * s.inner, channel = begin / s.inner % s.channels - 1;
  for (int64_t i = begin; i < end;) {
    next += s.inner;
    if (++channel == s.channels) channel = 0;
    const int64_t row_end = next < end ? next : end;
    const Place<C, false> place{channel};
    while (i < row_end) {
      const int64_t run = i + kRunVectors * V::size, run_end = run < row_end ? run : row_end;
      V first(C(0)), second(C(0));
      for (; i + V::size <= run_end; i += V::size) {
        const Terms<V> t = f(i, place, Full{});
        if constexpr (Sums > 0) first = first + t.first;
        if constexpr (Sums > 1) second = second + t.second;
      }
      if (i < run_end) {
        const Tail tail{(int)(run_end - i)};
        const Terms<V> t = f(i, place, tail);
        if constexpr (Sums > 0) first = first + live(t.first, tail);
        if constexpr (Sums > 1) second = second + live(t.second, tail);
        i = run_end;
      }
      if constexpr (Sums > 0) sums[channel] += sum_of_lanes(first);
      if constexpr (Sums > 1) sums[s.channels + channel] += sum_of_lanes(second);
    }
  }
}

template <class C, int Sums, class F>
FB_INLINE void sweep_periods(const BiasActSite& s, int64_t begin, int64_t end, double* sums, C* scratch, F&& f) {
  using V = Vec<C>;
  const int64_t period = s.period;
  int64_t held = 0;  // periods in scratch
  const auto empty = [&]() __attribute__((always_inline)) {
    for (int k = 0; k < Sums; ++k) {
      for (int64_t j = 0, channel = 0; j < period; channel = channel + 1 < s.channels ? channel + 1 : 0) {
        double total = 0;
        for (int64_t n = 0; n < s.inner; ++n, ++j) {
          total += scratch[k * period + j];
          scratch[k * period + j] = 0;
        }
        sums[k * s.channels + channel] += total;
      }
    }
    held = 0;
  };
  for (int64_t j = 0; j < Sums * period; ++j) scratch[j] = 0;
  int64_t at = begin % period;
  for (int64_t i = begin; i < end; at = 0) {
    const int64_t next = i + period - at, stop = next < end ? next : end;
    const auto one = [&](auto lanes) __attribute__((always_inline)) {
      const Terms<V> t = f(i, Place<C, true>{at}, lanes);
      if constexpr (Sums > 0) store(scratch + at, load<C>(scratch + at, lanes) + t.first, lanes);
      if constexpr (Sums > 1) store(scratch + period + at, load<C>(scratch + period + at, lanes) + t.second, lanes);
    };
    for (; i + V::size <= stop; i += V::size, at += V::size) one(Full{});
    if (i < stop) one(Tail{(int)(stop - i)});
    i = stop;
    if (Sums > 0 && ++held == kRunVectors) empty();
  }
  if constexpr (Sums > 0) empty();
}

template <class C, int Sums, class F>
FB_INLINE void sweep(const BiasActSite& s, int64_t begin, int64_t end, double* sums, void* scratch, F&& f) {
  if (s.period) sweep_periods<C, Sums>(s, begin, end, sums, static_cast<C*>(scratch), f);
  else sweep_channels<C, Sums>(s, begin, end, sums, f);
}

template <class S>
struct BiasActKernels {
  using C = Compute<S>;
  using V = Vec<C>;

  struct Constants {
    V slope, gain, low_gain, clamp;
    uint32_t unclamped;  // all bits where there is no clamp, so that a NaN passes

    FB_INLINE explicit Constants(const BiasActSite& s)
        : slope(C(s.negative_slope)), gain(C(s.gain)), low_gain(C(s.gain * s.negative_slope)), clamp(C(s.clamp)),
          unclamped(is_clamped(s.clamp) ? 0u : ~0u) {}

    FB_INLINE uint32_t inside(V scaled) const { return at_most_bits(abs(scaled), clamp) | unclamped; }
  };

  template <Activation A, class P, class Lanes>
  FB_INLINE static V slope_of(const BiasActSite& s, const Constants& k, const P& place, Lanes lanes) {
    if constexpr (A == Activation::prelu) return place.parameter(s.slope, lanes);
    else return k.slope;
  }

  template <Activation A, MaskKind K>
  static void fwd(const cpu::BiasActFwd& a, int64_t begin, int64_t end) {
    const BiasActSite& s = a.site;
    const Constants k(s);
    const S* x = static_cast<const S*>(a.x);
    S* y = static_cast<S*>(a.y);
    uint8_t* at = K == MaskKind::none ? nullptr : a.mask + begin / 8;
    BitWriter first(at), second(K == MaskKind::sign_gate ? at + (s.count + 7) / 8 : nullptr);
    sweep<C, 0>(s, begin, end, nullptr, nullptr, [&](int64_t i, auto place, auto lanes) __attribute__((always_inline)) {
      const V z = load<C>(x + i, lanes) + place.parameter(s.bias, lanes);
      const V scaled = k.gain * act<A>(z, slope_of<A>(s, k, place, lanes));
      store(y + i, max(-k.clamp, min(k.clamp, scaled)), lanes);
      const int count = lane_count(lanes, V::size);
      if constexpr (K == MaskKind::gate) {
        const uint32_t dead = A == Activation::relu ? nonpositive_bits(z) : 0u;
        first.push(k.inside(scaled) & ~dead, count);
      } else if constexpr (K != MaskKind::none) {
        first.push(positive_bits(z), count);
        if constexpr (K == MaskKind::sign_gate) second.push(k.inside(scaled), count);
      }
      return Terms<V>{z, z};
    });
    first.finish();
    second.finish();
  }

  // g times the derivative that the mask tells.
  template <MaskKind K>
  FB_INLINE static V through_mask(const BiasActSite& s, const Constants& k, V g, int64_t i) {
    const int64_t bytes = (s.count + 7) / 8;
    const V zero(C(0));
    if constexpr (K == MaskKind::none) return k.gain * g;
    else {
      const uint32_t bits = read_bits(s.mask, bytes, i);
      if constexpr (K == MaskKind::gate) return select(bits, k.gain * g, zero);
      else {
        const V dz = g * select(bits, k.gain, k.low_gain);
        if constexpr (K == MaskKind::sign) return dz;
        else return select(read_bits(s.mask + bytes, bytes, i), dz, zero);
      }
    }
  }

  template <MaskKind K, bool Sum>
  static void bwd_mask(const cpu::BiasActBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
    const BiasActSite& s = a.site;
    const Constants k(s);
    const S* dy = static_cast<const S*>(a.dy);
    S* dx = static_cast<S*>(a.dx);
    sweep<C, Sum>(s, begin, end, sums, scratch, [&](int64_t i, auto, auto lanes) __attribute__((always_inline)) {
      const V dz = through_mask<K>(s, k, load<C>(dy + i, lanes), i);
      store(dx + i, dz, lanes);
      return Terms<V>{dz, dz};
    });
  }

  template <MaskKind K>
  static void bwd_bwd_mask(const cpu::BiasActBwdBwdArgs& a, int64_t begin, int64_t end) {
    const BiasActSite& s = a.site;
    const Constants k(s);
    const S* v = static_cast<const S*>(a.v);
    S* a_dy = static_cast<S*>(a.a_dy);
    sweep<C, 0>(s, begin, end, nullptr, nullptr, [&](int64_t i, auto place, auto lanes) __attribute__((always_inline)) {
      const V q = load<C>(v + i, lanes) + place.parameter(a.v_bias, lanes);
      store(a_dy + i, through_mask<K>(s, k, q, i), lanes);
      return Terms<V>{q, q};
    });
  }

  // gain where the clamp leaves the value alone, else 0.
  template <Activation A>
  FB_INLINE static V passing_gain(const Constants& k, V z, V slope) {
    return select(k.inside(k.gain * act<A>(z, slope)), k.gain, V(C(0)));
  }

  template <Activation A>
  static void bwd_x(const cpu::BiasActBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
    const BiasActSite& s = a.site;
    const Constants k(s);
    const S *dy = static_cast<const S*>(a.dy), *x = static_cast<const S*>(a.x);
    S* dx = static_cast<S*>(a.dx);
    constexpr int kSums = A == Activation::prelu ? 2 : 1;
    sweep<C, kSums>(s, begin, end, sums, scratch, [&](int64_t i, auto place, auto lanes) __attribute__((always_inline)) {
      const V z = load<C>(x + i, lanes) + place.parameter(s.bias, lanes), slope = slope_of<A>(s, k, place, lanes);
      const V g = load<C>(dy + i, lanes) * passing_gain<A>(k, z, slope);
      const V dz = act_bwd<A>(g, z, slope);
      store(dx + i, dz, lanes);
      return Terms<V>{dz, g * negative_part(z)};
    });
  }

  // q = v + v_b:  a_dy = q act' [+ v_a min(z, 0)],  a_z = q dy act''  [prelu: v_a dy, and a_slope = q dy, where z <= 0]
  template <Activation A>
  static void bwd_bwd_x(const cpu::BiasActBwdBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
    const BiasActSite& s = a.site;
    const Constants k(s);
    const S *v = static_cast<const S*>(a.v), *dy = static_cast<const S*>(a.dy), *x = static_cast<const S*>(a.x);
    S *a_dy = static_cast<S*>(a.a_dy), *a_x = static_cast<S*>(a.a_x);
    constexpr int kSums = A == Activation::prelu ? 2 : 1;
    sweep<C, kSums>(s, begin, end, sums, scratch, [&](int64_t i, auto place, auto lanes) __attribute__((always_inline)) {
      const V z = load<C>(x + i, lanes) + place.parameter(s.bias, lanes), slope = slope_of<A>(s, k, place, lanes);
      const V factor = passing_gain<A>(k, z, slope), zero(C(0));
      // The gain multiplies elements, not parameters: their rounded product would err the same way all over a channel.
      const V q = load<C>(v + i, lanes) + place.parameter(a.v_bias, lanes), g = load<C>(dy + i, lanes) * factor;
      V a_z, a_slope = zero;
      if constexpr (A == Activation::prelu) {
        const V v_slope = place.parameter(a.v_slope, lanes);
        store(a_dy + i, factor * (act_bwd<A>(q, z, slope) + v_slope * negative_part(z)), lanes);
        a_z = where_positive(z, zero, g * v_slope);
        a_slope = where_positive(z, zero, g * q);
      } else {
        const Curve<V> curve = act_curve<A>(z);
        store(a_dy + i, factor * q * curve.first, lanes);
        a_z = q * g * curve.second;
      }
      store(a_x + i, a_z, lanes);
      return Terms<V>{a_z, a_slope};
    });
  }
};

template <MaskKind K>
struct MaskTag {
  static constexpr MaskKind value = K;
};

template <class F>
FB_INLINE void with_mask_kind(MaskKind kind, F&& f) {
  switch (kind) {
    case MaskKind::none: return f(MaskTag<MaskKind::none>{});
    case MaskKind::gate: return f(MaskTag<MaskKind::gate>{});
    case MaskKind::sign: return f(MaskTag<MaskKind::sign>{});
    case MaskKind::sign_gate: return f(MaskTag<MaskKind::sign_gate>{});
  }
}

// Calls f with the tag of an activation whose backward reads x.
template <class F>
FB_INLINE void with_kept_x(Activation a, F&& f) {
  switch (a) {
    case Activation::prelu: return f(ActivationTag<Activation::prelu>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
    default: return f(ActivationTag<Activation::elu>{});
  }
}

template <class S>
void bias_act_fwd(const cpu::BiasActFwd& a, int64_t begin, int64_t end) {
  using Kernels = BiasActKernels<S>;
  constexpr Activation identity = Activation::identity, relu = Activation::relu, leaky = Activation::leaky_relu;
  const MaskKind kind = a.mask ? mask_kind(a.site.activation, a.site.clamp) : MaskKind::none;
  if (kind == MaskKind::sign) return Kernels::template fwd<leaky, MaskKind::sign>(a, begin, end);
  if (kind == MaskKind::sign_gate) return Kernels::template fwd<leaky, MaskKind::sign_gate>(a, begin, end);
  if (kind == MaskKind::gate && a.site.activation == relu) {
    return Kernels::template fwd<relu, MaskKind::gate>(a, begin, end);
  }
  if (kind == MaskKind::gate) return Kernels::template fwd<identity, MaskKind::gate>(a, begin, end);
  with_activation(a.site.activation,
                  [&](auto tag) { Kernels::template fwd<decltype(tag)::value, MaskKind::none>(a, begin, end); });
}

template <class S>
void bias_act_bwd(const cpu::BiasActBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
  using Kernels = BiasActKernels<S>;
  const BiasActSite& s = a.site;
  if (keeps_x(s.activation)) {
    return with_kept_x(s.activation, [&](auto tag) {
      Kernels::template bwd_x<decltype(tag)::value>(a, begin, end, sums, scratch);
    });
  }
  with_mask_kind(mask_kind(s.activation, s.clamp), [&](auto kind) {
    constexpr MaskKind K = decltype(kind)::value;
    if (a.dbias) Kernels::template bwd_mask<K, true>(a, begin, end, sums, scratch);
    else Kernels::template bwd_mask<K, false>(a, begin, end, sums, scratch);
  });
}

template <class S>
void bias_act_bwd_bwd(const cpu::BiasActBwdBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
  using Kernels = BiasActKernels<S>;
  const BiasActSite& s = a.site;
  if (keeps_x(s.activation)) {
    return with_kept_x(s.activation, [&](auto tag) {
      Kernels::template bwd_bwd_x<decltype(tag)::value>(a, begin, end, sums, scratch);
    });
  }
  with_mask_kind(mask_kind(s.activation, s.clamp), [&](auto kind) {
    Kernels::template bwd_bwd_mask<decltype(kind)::value>(a, begin, end);
  });
}

}  // namespace fuseblock::FB_ISA
