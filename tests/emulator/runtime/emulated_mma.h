// Twins of csrc/cuda/mma.h. The lane that comes last does the work of the whole warp.
#pragma once

#include "hardware.h"

namespace fuseblock {
namespace emulated {

struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Both halves of a register.
template <class T>
void unpack(uint32_t bits, float& low, float& high) {
  T pair[2];
  std::memcpy(&pair, &bits, sizeof(bits));
  low = static_cast<float>(pair[0]);
  high = static_cast<float>(pair[1]);
}

// c += a b with additions in order of k.
template <int K>
void accumulate(void* const* lanes, const float (&a)[16][K], const float (&b)[8][K]) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& sum = static_cast<MmaLane*>(lanes[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
      float total = sum;
      for (int k = 0; k < K; ++k) total += a[row][k] * b[column][k];
      sum = total;
    }
  }
}

template <class T>
void mma_m16n8k16(void* const* lanes, unsigned) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& has = *static_cast<MmaLane*>(lanes[lane]);
    const int group = lane / 4, k = lane % 4 * 2;
    for (int n = 0; n < 4; ++n) {
      float* const at = &a[group + n % 2 * 8][k + n / 2 * 8];
      unpack<T>(has.a[n], at[0], at[1]);
    }
    for (int n = 0; n < 2; ++n) {
      float* const at = &b[group][k + n * 8];
      unpack<T>(has.b[n], at[0], at[1]);
    }
  }
  accumulate(lanes, a, b);
}

inline void mma_m16n8k8_tf32(void* const* lanes, unsigned) {
  constexpr uint32_t kUsed = ~0x1fffu;
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& has = *static_cast<MmaLane*>(lanes[lane]);
    const int group = lane / 4, k = lane % 4;
    for (int n = 0; n < 4; ++n) a[group + n % 2 * 8][k + n / 2 * 4] = float_of(has.a[n] & kUsed);
    for (int n = 0; n < 2; ++n) b[group][k + n * 4] = float_of(has.b[n] & kUsed);
  }
  accumulate(lanes, a, b);
}

struct MatrixLane {
  const void* row;
  uint32_t* r;
};

template <int N, bool kTransposed>
void ldmatrix(void* const* lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < N; ++n) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int row = kTransposed ? lane % 4 * 2 + half : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + half;
        pair[half] = static_cast<const uint16_t*>(static_cast<MatrixLane*>(lanes[n * 8 + row])->row)[column];
      }
      std::memcpy(&static_cast<MatrixLane*>(lanes[lane])->r[n], pair, sizeof(pair));
    }
  }
}

template <int N, bool kTransposed>
void load_matrices(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  if (cuda_emulator::current->lane < 8 * N) cuda_emulator::check_shared(row, 16, 16, "ldmatrix");
  MatrixLane mine{row, r};
  cuda_emulator::warp_collective(0xffffffffu, "ldmatrix", &mine, ldmatrix<N, kTransposed>);
}

inline void need_whole_warp(const char* operation) {
  const unsigned lanes = cuda_emulator::current->warp_lanes;
  if (lanes != 32) cuda_emulator::fail("%s in a warp of %u lanes", operation, lanes);
}

}  // namespace emulated

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  emulated::need_whole_warp("mma");
  emulated::MmaLane mine{c, a, b};
  cuda_emulator::warp_collective(0xffffffffu, "mma.m16n8k16", &mine, emulated::mma_m16n8k16<T>);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::need_whole_warp("mma");
  emulated::MmaLane mine{c, a, b};
  cuda_emulator::warp_collective(0xffffffffu, "mma.m16n8k8", &mine, emulated::mma_m16n8k8_tf32);
}

inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  // NaN and infinity keep what their first ten bits of mantissa say; a NaN stays one.
  if (!finite) return (bits & 0x007fffffu) != 0 ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(x) + 0x1000u;
  low = __float_as_uint(x - __uint_as_float(high & ~0x1fffu));
}

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row) {
  emulated::need_whole_warp("ldmatrix");
  emulated::load_matrices<N, false>(r, row);
}

template <int N>
void ldmatrix_transposed(uint32_t (&r)[N], const void* row) {
  emulated::need_whole_warp("ldmatrix");
  emulated::load_matrices<N, true>(r, row);
}

inline uint32_t movmatrix_transposed(uint32_t r) {
  struct Lane {
    uint32_t in, out;
  } mine{r, 0};
  emulated::need_whole_warp("movmatrix");
  cuda_emulator::warp_collective(0xffffffffu, "movmatrix", &mine, [](void* const* lanes, unsigned) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(&matrix[lane / 4][lane % 4 * 2], &static_cast<Lane*>(lanes[lane])->in, 4);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const uint16_t pair[2] = {matrix[lane % 4 * 2][lane / 4], matrix[lane % 4 * 2 + 1][lane / 4]};
      std::memcpy(&static_cast<Lane*>(lanes[lane])->out, pair, sizeof(pair));
    }
  });
  return mine.out;
}

}  // namespace fuseblock
