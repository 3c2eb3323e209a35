// The clock of a multiprocessor.
#pragma once

#include "cuda/launch.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_clock.h"

#else

namespace fuseblock {

// Cycles so far. The instructions on memory before it have been issued, those after it have not.
__device__ __forceinline__ long long clock_now() {
  long long now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

}  // namespace fuseblock

#endif
