// PTX instructions as device functions, one each. The emulator has a twin of every one, of the same name.
#pragma once

#include "cuda/launch.h"

#if !defined(FUSEBLOCK_EMULATE_CUDA)

#include <cstdint>
#include <type_traits>

namespace fuseblock {

// c += a b for a (16, 16) row major and b (16, 8) column major, T = __half or __nv_bfloat16, sums in float32. Each lane of
// the warp holds the fragments that the PTX ISA gives it: of a, rows lane / 4 (+ 8 in registers 1 and 3) and columns
// lane % 4 * 2 (+ 8 in registers 2 and 3), two neighbours a register.
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

}  // namespace fuseblock

#endif
