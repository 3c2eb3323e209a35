// The products of the recurrence in tensor cores, for every dtype: what their operands are and how they are multiplied.
//
// One mma takes a step of 32 bytes of k: 16 elements of 16 bit, or 8 of float32. In bytes, the fragments of both instructions
// (mma.h) are the same; so is what ldmatrix makes of rows of 16 bytes. An operand's word, one register, is two elements or one.
//
//   passes   of mma over the operands. 16 bit: 1, products are exact. float32: 1, both operands are rounded to TF32, or 3:
//            each is split into two TF32 numbers, x = high + low, and
//              w x = w_low x_high + w_high x_low + w_high x_high    but for some 2^-22 of it
#pragma once

#include <type_traits>

#include "cuda/lstm_recurrence_views.cuh"
#include "cuda/mma.h"

namespace fuseblock::lstm_recurrence {

// Elements of a word, and of the k of one mma.
template <class T>
inline constexpr int kWord = 4 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kStep = 8 * kWord<T>;

template <class T>
using Word = Vec<T, kWord<T>>;

// A word of the left operand, which stays in a register for the whole sequence. Three passes split it whenever it is used:
// there is no room for both parts.
template <class T, int kPasses>
__device__ __forceinline__ uint32_t weight(const Word<T>& x) {
  if constexpr (std::is_same_v<T, float> && kPasses == 1) {
    return round_to_tf32(x.element[0]);
  } else {
    return bits(x);
  }
}

// The right operand of one mma: two words, which of float32 in three passes are both parts.
template <class T, int kPasses>
struct RightOperand {
  uint32_t high[2], low[2];
};

// From words as ldmatrix gives them.
template <class T, int kPasses>
__device__ __forceinline__ RightOperand<T, kPasses> right_operand(uint32_t first, uint32_t second) {
  RightOperand<T, kPasses> x{{first, second}, {}};
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float word = __uint_as_float(x.high[n]);
      if constexpr (kPasses == 1) {
        x.high[n] = round_to_tf32(word);
      } else {
        split_tf32(word, x.high[n], x.low[n]);
      }
    }
  }
  return x;
}

// What mma adds up. Of three passes, two add small numbers to small ones: the large sum is rounded as often as in one pass.
// With two chains, of which each takes every other mma, half as often.
template <int kPasses, int kChains = 1>
struct Sum {
  float high[kChains][4] = {}, low[4] = {};

  __device__ __forceinline__ float operator[](int n) const {
    const float sum = kChains == 2 ? high[0][n] + high[kChains - 1][n] : high[0][n];
    return kPasses == 3 ? sum + low[n] : sum;
  }
};

// sum += weights x.
template <class T, int kPasses, int kChains>
__device__ __forceinline__ void multiply(Sum<kPasses, kChains>& sum, const uint32_t (&weights)[4],
                                         const RightOperand<T, kPasses>& x, int chain = 0) {
  if constexpr (!std::is_same_v<T, float>) {
    mma_m16n8k16<T>(sum.high[chain], weights, x.high);
  } else if constexpr (kPasses == 1) {
    mma_m16n8k8_tf32(sum.high[chain], weights, x.high);
  } else {
    uint32_t high[4], low[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) split_tf32(__uint_as_float(weights[n]), high[n], low[n]);
    mma_m16n8k8_tf32(sum.low, low, x.high);
    mma_m16n8k8_tf32(sum.low, high, x.low);
    mma_m16n8k8_tf32(sum.high[chain], high, x.high);
  }
}

}  // namespace fuseblock::lstm_recurrence
