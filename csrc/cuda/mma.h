// Matrix products of a warp and the loads that feed them: one PTX instruction each. All 32 lanes call them together.
//
// Fragments, as the PTX ISA lays them out; lane = 4 * group + pair:
//   16-bit A (16, 16)   a[0]: row group, columns 2 pair and 2 pair + 1; a[1]: row + 8; a[2]: columns + 8; a[3]: both + 8
//   16-bit B (16, 8)    b[0]: rows 2 pair and 2 pair + 1, column group; b[1]: rows + 8
//   TF32 A (16, 8)      a[0]: row group, column pair; a[1]: row + 8; a[2]: column + 4; a[3]: both
//   TF32 B (8, 8)       b[0]: row pair, column group; b[1]: row + 4
//   C (16, 8)           c[0], c[1]: row group, columns 2 pair and 2 pair + 1; c[2], c[3]: row + 8
#pragma once

#include "cuda/launch.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_mma.h"

#else

#include <cstdint>
#include <type_traits>

namespace fuseblock {

// c += a b for a (16, 16) row major and b (16, 8) column major, T = __half or __nv_bfloat16, sums in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// c += a b for a (16, 8) row major and b (8, 8) column major, bits of float32 of which the hardware ignores the last 13:
// round_to_tf32 first, or values are truncated.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of the nearest TF32 number (10 bits of mantissa); ties go away from zero. As a float: __uint_as_float.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Operands of mma_m16n8k8_tf32 that make up x: high, which it takes as x rounded to TF32, and low = x - high, of whose 12 bits
// it ignores at most one; low is NaN if x is, or is infinite. volatile: or both parts of an x that stays in its register would
// be made ahead of a loop, and take two. (cvt.rna, which keeps NaN, is four instructions.)
__device__ __forceinline__ void split_tf32(float x, uint32_t& high, uint32_t& low) {
  float rest;
  asm volatile(
      "{\n"
      ".reg .b32 rounded;\n"
      "add.u32 %0, %2, 0x1000;\n"
      "and.b32 rounded, %0, 0xffffe000;\n"
      "sub.f32 %1, %3, rounded;\n"
      "}"
      : "=&r"(high), "=f"(rest)
      : "r"(__float_as_uint(x)), "f"(x));
  low = __float_as_uint(rest);
}

// Register n of every lane: elements 2 pair and 2 pair + 1 of row `group` of the n-th (8, 8) matrix of 16-bit elements.
// Lane 8 n + r passes the address, in shared memory and a multiple of 16, of row r of matrix n; lanes from 8 N on pass any.
// (16, 16) row major A: rows r and columns 0, rows + 8, columns + 8, both. (16, 8) B stored as its transpose: k, k + 8.
template <int N>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// The same of the transposed matrices: rows 2 pair and 2 pair + 1 of column `group`.
template <int N>
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// The transpose of an (8, 8) matrix of 16-bit elements that the warp holds as one register of each lane.
__device__ __forceinline__ uint32_t movmatrix_transposed(uint32_t r) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(r));
  return result;
}

}  // namespace fuseblock

#endif
