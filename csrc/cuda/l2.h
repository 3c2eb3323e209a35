// What blocks of a grid tell each other through L2: counters, and loads and stores that bypass the multiprocessor's cache.
#pragma once

#include "cuda/launch.h"
#include "cuda/spin.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_l2.h"

#else

#include <cstdint>
#include <cstring>

namespace fuseblock {

// Adds after everything that this thread wrote, and what it knows that others wrote.
__device__ __forceinline__ void add_release(unsigned* counter, unsigned n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)), "r"(n) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return value;
}

// Until the counter, which may wrap around, has reached target.
__device__ __forceinline__ bool has_reached(const unsigned* counter, unsigned target) {
  return static_cast<int>(load_acquire(counter) - target) >= 0;
}
__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned target) {
  FB_SPIN_UNTIL(has_reached(counter, target) || (__nanosleep(20), false));
}

// Of 4, 8 or 16 bytes, past the multiprocessor's own cache, which other blocks' stores do not reach.
template <class T>
__device__ __forceinline__ T load_l2(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t v[sizeof(T) / 4];
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v[0]) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(address) : "memory");
  } else {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(address)
                 : "memory");
  }
  T x;
  memcpy(&x, v, sizeof(T));
  return x;
}

// What others will load with load_l2. The same thread must not read it back with an ordinary load.
template <class T>
__device__ __forceinline__ void store_l2(T* p, const T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t v[sizeof(T) / 4];
  memcpy(v, &x, sizeof(T));
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(address), "r"(v[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.cg.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v[0]), "r"(v[1]) : "memory");
  } else {
    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
}

}  // namespace fuseblock

#endif
