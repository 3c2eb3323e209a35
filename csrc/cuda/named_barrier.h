// Barriers of some of a block's warps, so that warps with different work need not wait for each other.
#pragma once

#include "cuda/launch.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "hardware.h"

namespace fuseblock {

inline void named_barrier_sync(unsigned id, unsigned threads) { cuda_emulator::named_barrier(id, threads, true); }
inline void named_barrier_arrive(unsigned id, unsigned threads) { cuda_emulator::named_barrier(id, threads, false); }

}  // namespace fuseblock

#else

namespace fuseblock {

// Waits until `threads`, whole warps, have come to barrier `id` (1 to 15; __syncthreads is 0). Orders memory among them.
__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of them and goes on.
__device__ __forceinline__ void named_barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fuseblock

#endif
