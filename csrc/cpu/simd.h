// SIMD vectors on GCC vector extensions, and the storage types they load from and store to.
//
// Included only from isa_*.cpp, inside a region that is compiled for one instruction set; FB_ISA names that set's
// namespace and FB_VEC_BYTES is its register width. Nothing here instantiates a template of the standard library: the
// linker would keep one copy for all instruction sets.
//
// Arithmetic is float (also for 16-bit storage) or double. A vector's lanes in memory are either `Full` or the first
// few (`Tail`): tails load zeros and never touch memory behind the last lane.
#pragma once

#include <cstdint>

#include "storage.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FB_INLINE inline __attribute__((always_inline))

namespace fuseblock::FB_ISA {

using cpu::BFloat16;
using cpu::Compute;
using cpu::DType;
using cpu::Half;

// Register types. They are spelled per lane type: GCC takes dependent vector types of one template for equal.
template <class Lane>
struct Register;
template <>
struct Register<float> {
  typedef float Raw __attribute__((vector_size(FB_VEC_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FB_VEC_BYTES)));
  using Int = int32_t;
  static constexpr int mantissa = 23;
};
template <>
struct Register<double> {
  typedef double Raw __attribute__((vector_size(FB_VEC_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FB_VEC_BYTES)));
  using Int = int64_t;
  static constexpr int mantissa = 52;
};
typedef uint16_t U16 __attribute__((vector_size(FB_VEC_BYTES / 2)));  // as many lanes as floats
typedef uint32_t U32 __attribute__((vector_size(FB_VEC_BYTES)));

template <class L>
struct Vec {
  using Lane = L;
  using Int = typename Register<L>::Int;
  using Raw = typename Register<L>::Raw;
  using Bits = typename Register<L>::Bits;
  static constexpr int size = FB_VEC_BYTES / sizeof(L);

  Raw raw;

  Vec() = default;
  FB_INLINE Vec(Raw r) : raw(r) {}
  FB_INLINE Vec(L scalar) : raw(scalar - Raw{}) {}
  FB_INLINE Bits bits() const { return (Bits)raw; }
};

#define FB_VEC_OPERATOR(op) \
  template <class L>        \
  FB_INLINE Vec<L> operator op(Vec<L> a, Vec<L> b) { return Vec<L>(a.raw op b.raw); }
FB_VEC_OPERATOR(+)
FB_VEC_OPERATOR(-)
FB_VEC_OPERATOR(*)
FB_VEC_OPERATOR(/)
#undef FB_VEC_OPERATOR
template <class L>
FB_INLINE Vec<L> operator-(Vec<L> a) { return Vec<L>(-a.raw); }

// min and max return `v` where it is NaN, which is what the x86 instructions do with this operand order.
template <class L>
FB_INLINE Vec<L> min(Vec<L> bound, Vec<L> v) {
#if FB_VEC_BYTES == 64  // GCC turns the comparison into two instructions there
  if constexpr (sizeof(L) == 4) return Vec<L>((typename Vec<L>::Raw)_mm512_maskz_min_ps(-1, bound.raw, v.raw));
  else return Vec<L>((typename Vec<L>::Raw)_mm512_maskz_min_pd(-1, bound.raw, v.raw));
#else
  return Vec<L>(bound.raw < v.raw ? bound.raw : v.raw);
#endif
}

template <class L>
FB_INLINE Vec<L> max(Vec<L> bound, Vec<L> v) {
#if FB_VEC_BYTES == 64
  if constexpr (sizeof(L) == 4) return Vec<L>((typename Vec<L>::Raw)_mm512_maskz_max_ps(-1, bound.raw, v.raw));
  else return Vec<L>((typename Vec<L>::Raw)_mm512_maskz_max_pd(-1, bound.raw, v.raw));
#else
  return Vec<L>(bound.raw > v.raw ? bound.raw : v.raw);
#endif
}

// `a` where z > 0 (z <= 0), else `b`; a NaN in z chooses `b`.
template <class L>
FB_INLINE Vec<L> where_positive(Vec<L> z, Vec<L> a, Vec<L> b) {
  return Vec<L>(z.raw > 0 ? a.raw : b.raw);
}
template <class L>
FB_INLINE Vec<L> where_nonpositive(Vec<L> z, Vec<L> a, Vec<L> b) {
  return Vec<L>(z.raw <= 0 ? a.raw : b.raw);
}

template <class L>
FB_INLINE Vec<L> abs(Vec<L> v) {
  constexpr typename Vec<L>::Int all_but_sign = ~(typename Vec<L>::Int(1) << (8 * sizeof(L) - 1));
  return Vec<L>((typename Vec<L>::Raw)(v.bits() & all_but_sign));
}

// |magnitude| with the sign of `sign`; magnitude must not be negative.
template <class L>
FB_INLINE Vec<L> copy_sign(Vec<L> magnitude, Vec<L> sign) {
  constexpr typename Vec<L>::Int sign_bit = typename Vec<L>::Int(1) << (8 * sizeof(L) - 1);
  return Vec<L>((typename Vec<L>::Raw)(magnitude.bits() | (sign.bits() & sign_bit)));
}

// 2^n from the bits of n + magic (ExpConstants): the low mantissa bits hold the biased exponent.
template <class L>
FB_INLINE Vec<L> pow2_bits(Vec<L> shifted) {
  return Vec<L>((typename Vec<L>::Raw)(shifted.bits() << Register<L>::mantissa));
}

// d[j] = 1 / d[j] for j < S, d[j] / (d[j] + 2) for the others; divisors are positive and finite, or NaN. AVX-512 divides
// 16 floats in 16 cycles; a reciprocal and its refinement take 5. (The masked intrinsics are full-width here; GCC 12 warns
// about the undefined operand of the plain ones.)
template <int S, int N, class L>
FB_INLINE void quotients(Vec<L> (&d)[N]) {
#define FB_EACH _Pragma("GCC unroll 16") for (int j = 0; j < N; ++j)
#if FB_VEC_BYTES == 64
  if constexpr (sizeof(L) == 4) {
    Vec<L> b[N], r[N], e[N];
    FB_EACH b[j] = j < S ? d[j] : d[j] + Vec<L>(2);
    FB_EACH r[j].raw = _mm512_maskz_rcp14_ps(-1, b[j].raw);
    FB_EACH e[j] = Vec<L>(1) - b[j] * r[j];
    FB_EACH r[j] = r[j] + r[j] * e[j];
    FB_EACH d[j] = j < S ? r[j] : d[j] * r[j];
    return;
  }
#endif
  FB_EACH d[j] = j < S ? Vec<L>(1) / d[j] : d[j] / (d[j] + Vec<L>(2));
#undef FB_EACH
}

// ---- memory -----------------------------------------------------------------------------------------------------

struct Full {};
struct Tail {
  int lanes;
};

FB_INLINE Vec<float> widen(U16 bits, BFloat16) {
  return Vec<float>((Vec<float>::Raw)(__builtin_convertvector(bits, U32) << 16));
}

FB_INLINE U16 narrow(Vec<float> v, BFloat16) {
  const U32 bits = (U32)v.raw;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U32 is_nan = (U32)(v.raw != v.raw);
  return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), U16);
}

FB_INLINE Vec<float> widen(U16 bits, Half) {
#if FB_VEC_BYTES == 64
  return Vec<float>((Vec<float>::Raw)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits));
#elif FB_VEC_BYTES == 32
  return Vec<float>((Vec<float>::Raw)_mm256_cvtph_ps((__m128i)bits));
#else
  const U32 wide = __builtin_convertvector(bits, U32), magnitude = wide & 0x7fffu, sign = (wide & 0x8000u) << 16;
  const U32 rebias = (magnitude << 13) + ((127u - 15u) << 23);
  const U32 special = rebias + ((128u - 16u) << 23);  // infinity and NaN keep the largest exponent
  const U32 subnormal = (U32)(__builtin_convertvector((Vec<float>::Bits)magnitude, Vec<float>::Raw) * 0x1p-24f);
  const U32 is_special = (U32)(magnitude >= 0x7c00u), is_subnormal = (U32)(magnitude < 0x400u);
  const U32 value = (is_special & special) | (is_subnormal & subnormal) | (~(is_special | is_subnormal) & rebias);
  return Vec<float>((Vec<float>::Raw)(value | sign));
#endif
}

FB_INLINE U16 narrow(Vec<float> v, Half) {
#if FB_VEC_BYTES == 64
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v.raw, _MM_FROUND_TO_NEAREST_INT);
#elif FB_VEC_BYTES == 32
  return (U16)_mm256_cvtps_ph((__m256)v.raw, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = (U32)v.raw, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const U32 is_nan = (U32)(magnitude > 0x7f800000u);
  const U32 is_large = (U32)(magnitude >= ((127u + 16u) << 23)), is_small = (U32)(magnitude < (113u << 23));
  const U32 large = (is_nan & 0x7e00u) | (~is_nan & 0x7c00u);
  // Adding 0.5 leaves the subnormal's 10 bits, rounded to nearest even, at the end of the mantissa.
  const U32 small = (U32)((Vec<float>::Raw)magnitude + 0.5f) - 0x3f000000u;
  const U32 odd = (magnitude >> 13) & 1u;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const U32 value = (is_large & large) | (is_small & small) | (~(is_large | is_small) & normal);
  return __builtin_convertvector(value | sign, U16);
#endif
}

template <class C, class S>
FB_INLINE Vec<C> load(const S* p, Full) {
  if constexpr (sizeof(S) == sizeof(C)) {
    typename Vec<C>::Raw r;
    __builtin_memcpy(&r, p, sizeof r);
    return Vec<C>(r);
  } else {
    U16 bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(bits, S{});
  }
}

template <class C, class S>
FB_INLINE void store(S* p, Vec<C> v, Full) {
  if constexpr (sizeof(S) == sizeof(C)) {
    __builtin_memcpy(p, &v.raw, sizeof v.raw);
  } else {
    const U16 bits = narrow(v, S{});
    __builtin_memcpy(p, &bits, sizeof bits);
  }
}

template <class C, class S>
FB_INLINE Vec<C> load(const S* p, Tail tail) {
#if FB_VEC_BYTES == 64
  const unsigned mask = (1u << tail.lanes) - 1u;
  if constexpr (sizeof(S) == 4) return Vec<C>((typename Vec<C>::Raw)_mm512_maskz_loadu_ps(mask, p));
  else if constexpr (sizeof(S) == 8) return Vec<C>((typename Vec<C>::Raw)_mm512_maskz_loadu_pd(mask, p));
  else return widen((U16)_mm256_maskz_loadu_epi16(mask, p), S{});
#else
  alignas(FB_VEC_BYTES) S lanes[Vec<C>::size] = {};
  for (int k = 0; k < tail.lanes; ++k) lanes[k] = p[k];
  return load<C>(lanes, Full{});
#endif
}

template <class C, class S>
FB_INLINE void store(S* p, Vec<C> v, Tail tail) {
#if FB_VEC_BYTES == 64
  const unsigned mask = (1u << tail.lanes) - 1u;
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, mask, (__m512)v.raw);
  else if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(p, mask, (__m512d)v.raw);
  else _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, S{}));
#else
  alignas(FB_VEC_BYTES) S lanes[Vec<C>::size];
  store(lanes, v, Full{});
  for (int k = 0; k < tail.lanes; ++k) p[k] = lanes[k];
#endif
}

// An absent tensor (null) reads as zeros.
template <class C, class S, class Lanes>
FB_INLINE Vec<C> load_or_zero(const S* p, Lanes lanes) {
  return p ? load<C>(p, lanes) : Vec<C>(C(0));
}

// Calls f(Full) or f(Tail) for the vector that starts at unit u of n.
template <class C, class F>
FB_INLINE void with_lanes(int64_t u, int64_t n, F&& f) {
  if (n - u >= Vec<C>::size) f(Full{});
  else f(Tail{(int)(n - u)});
}

}  // namespace fuseblock::FB_ISA
