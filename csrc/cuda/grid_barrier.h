// A barrier between the blocks of a cooperative launch, in two halves with work between them.
//
//   grid_arrive(state);                     after this block's stores of step t
//   ...                                     work that needs nothing of the others
//   grid_wait(state, (t + 1) * blocks);     before loads of what they stored (load_l2)
//   grid_leave(state, blocks);              once, at the end: the state is ready for the next launch
//
// The counter only grows during a launch, so a slow block can still see that an old step is over. Whole blocks call these.
#pragma once

#include "cuda/l2.h"

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
