// A barrier between the blocks of a cooperative launch, in two halves with work between them, and loads and stores of what
// blocks tell each other through L2.
//
//   grid_arrive(state);                     after this block's stores of step t
//   ...                                     work that needs nothing of the others
//   grid_wait(state, (t + 1) * blocks);     before loads of what they stored
//   grid_leave(state, blocks);              once, at the end: the state is ready for the next launch
//
// The counter only grows during a launch, so a slow block can still see that an old step is over. Whole blocks call these.
#pragma once

#include "cuda/launch.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_grid_barrier.h"

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

// Until the counter, which may wrap around, has reached target. Traps after FUSEBLOCK_SPIN_LIMIT tries, where defined.
__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned target) {
  for (unsigned long long tries = 0; static_cast<int>(load_acquire(counter) - target) < 0; ++tries) {
    __nanosleep(20);
#if defined(FUSEBLOCK_SPIN_LIMIT)
    if (tries > FUSEBLOCK_SPIN_LIMIT) __trap();
#endif
  }
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

namespace fuseblock {

// In global memory, zero before the first launch.
struct GridBarrier {
  unsigned arrived, left;
};

__device__ __forceinline__ bool is_first_thread() { return threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0; }

__device__ __forceinline__ void grid_arrive(GridBarrier* barrier) {
  __syncthreads();
  if (is_first_thread()) add_release(&barrier->arrived, 1);
}

// Until so many have arrived since the launch began.
__device__ __forceinline__ void grid_wait(const GridBarrier* barrier, unsigned arrivals) {
  if (is_first_thread()) wait_for_count(&barrier->arrived, arrivals);
  __syncthreads();
}

// After this block's last wait. The last of the `blocks` that leaves sets the counters back: none of them waits any more.
__device__ __forceinline__ void grid_leave(GridBarrier* barrier, unsigned blocks) {
  __syncthreads();
  if (!is_first_thread()) return;
  __threadfence();
  if (atomicAdd(&barrier->left, 1) == blocks - 1) {
    atomicExch(&barrier->arrived, 0);
    atomicExch(&barrier->left, 0);
  }
}

}  // namespace fuseblock
