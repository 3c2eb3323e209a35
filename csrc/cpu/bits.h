// One bit an element beside SIMD vectors: comparisons to bits, bits to selections, streams of bits in memory.
//
// Element i is bit i % 8 of byte i / 8.
#pragma once

#include "simd.h"

namespace fuseblock::FB_ISA {

// Bit j is set where lane j of a comparison's result is true.
template <class L>
FB_INLINE uint32_t bits_of(typename Vec<L>::Bits truth) {
#if FB_VEC_BYTES == 64
  if constexpr (sizeof(L) == 4) return _mm512_movepi32_mask((__m512i)truth);
  else return _mm512_movepi64_mask((__m512i)truth);
#elif FB_VEC_BYTES == 32
  if constexpr (sizeof(L) == 4) return (uint32_t)_mm256_movemask_ps((__m256)truth);
  else return (uint32_t)_mm256_movemask_pd((__m256d)truth);
#elif defined(__x86_64__)
  if constexpr (sizeof(L) == 4) return (uint32_t)_mm_movemask_ps((__m128)truth);
  else return (uint32_t)_mm_movemask_pd((__m128d)truth);
#else
  uint32_t bits = 0;
  for (int j = 0; j < Vec<L>::size; ++j) bits |= (uint32_t)(truth[j] & 1) << j;
  return bits;
#endif
}

template <class L>
FB_INLINE uint32_t positive_bits(Vec<L> v) { return bits_of<L>(v.raw > 0); }
template <class L>
FB_INLINE uint32_t nonpositive_bits(Vec<L> v) { return bits_of<L>(v.raw <= 0); }
template <class L>
FB_INLINE uint32_t at_most_bits(Vec<L> v, Vec<L> limit) { return bits_of<L>(v.raw <= limit.raw); }

// a where the lane's bit is set, else b.
template <class L>
FB_INLINE Vec<L> select(uint32_t bits, Vec<L> a, Vec<L> b) {
  using V = Vec<L>;
#if FB_VEC_BYTES == 64
  if constexpr (sizeof(L) == 4) return V((typename V::Raw)_mm512_mask_blend_ps((__mmask16)bits, b.raw, a.raw));
  else return V((typename V::Raw)_mm512_mask_blend_pd((__mmask8)bits, b.raw, a.raw));
#else
  typename V::Bits lane = {};
  for (int j = 0; j < V::size; ++j) lane[j] = typename V::Int(1) << j;
  return V((typename V::Raw)((((typename V::Int)bits - typename V::Bits{}) & lane) != 0 ? a.raw : b.raw));
#endif
}

FB_INLINE int lane_count(Full, int size) { return size; }
FB_INLINE int lane_count(Tail tail, int) { return tail.lanes; }

// Appends bits to a row of bytes that nobody else writes.
class BitWriter {
 public:
  FB_INLINE explicit BitWriter(uint8_t* to) : to_(to) {}

  FB_INLINE void push(uint32_t bits, int count) {
    pending_ |= (uint64_t)(bits & ((1u << count) - 1u)) << filled_;
    filled_ += count;
    if (filled_ < 32) return;
    const uint32_t word = (uint32_t)pending_;
    __builtin_memcpy(to_, &word, sizeof word);
    to_ += sizeof word;
    pending_ >>= 32;
    filled_ -= 32;
  }
  FB_INLINE void finish() {
    for (; filled_ > 0; filled_ -= 8, pending_ >>= 8) *to_++ = (uint8_t)pending_;
  }

 private:
  uint8_t* to_;
  uint64_t pending_ = 0;
  int filled_ = 0;
};

// Bits of elements [i, i + up to 16) of a plane of `bytes` bytes; behind the plane's end they are 0.
FB_INLINE uint32_t read_bits(const uint8_t* plane, int64_t bytes, int64_t i) {
  const int64_t byte = i >> 3;
  uint32_t word = 0;
  if (byte + (int64_t)sizeof word <= bytes) __builtin_memcpy(&word, plane + byte, sizeof word);
  else __builtin_memcpy(&word, plane + byte, (size_t)(bytes - byte));
  return word >> (i & 7);
}

}  // namespace fuseblock::FB_ISA
