// What the microbenchmarks' kernels share. They are built from csrc/cuda's wrappers, so that what is measured is what the
// library's kernels use, and so that the emulator runs them.
#pragma once

#include "cuda/clock.h"
#include "cuda/grid_barrier.h"
#include "micro.h"

#define FB_MICRO(name, cooperative, kernel)                                                                                \
  extern "C" __attribute__((visibility("default"))) int micro_##name(const MicroLaunch* m) {                               \
    const ::fuseblock::Placement placement{static_cast<unsigned>(m->cluster), cooperative};                                \
    const dim3 threads(m->threads);                                                                                        \
    if (m->resident != nullptr) {                                                                                          \
      *m->resident = FB_RESIDENT_BLOCKS(kernel, placement, threads, m->shared_bytes);                                      \
      return cudaSuccess;                                                                                                  \
    }                                                                                                                      \
    return FB_LAUNCH_PLACED(kernel, placement, dim3(m->blocks), threads, m->shared_bytes, m->stream, *m);                  \
  }

namespace fuseblock {

// Whole blocks start and stop it.
struct Stopwatch {
  long long begin = clock_now();

  __device__ __forceinline__ void stop(const MicroLaunch& m) const {
    __syncthreads();
    if (is_first_thread()) m.clocks[blockIdx.x] = clock_now() - begin;
  }
};

}  // namespace fuseblock
