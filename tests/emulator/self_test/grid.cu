// Self-tests of grid_barrier.h: a recurrence whose state is spread over a grid. nvcc compiles this file too.
#include "grid.h"

#include "cuda/grid_barrier.h"

namespace {

using namespace fuseblock;

template <int kMistake>
__global__ void spread_kernel(float* y, GridBarrier* barrier, int steps) {
  const int size = gridDim.x * blockDim.x, me = blockIdx.x * blockDim.x + threadIdx.x;
  for (int t = 0; t < steps; ++t) {
    float sum = static_cast<float>(me);
    if (t > 0) {
      if (kMistake == kGridSleepsForever) {
        while (*reinterpret_cast<volatile unsigned*>(&barrier->left) == 0) __nanosleep(100);
      } else if (kMistake != kGridNoWait) {
        grid_wait(barrier, (kMistake == kGridWaitsForTooFew ? t - 1 : t) * gridDim.x);
      }
      for (int n = 0; n < size; ++n) sum += load_l2(y + (t - 1) * size + n) * static_cast<float>((n + me) % 5 + 1);
    }
    store_l2(y + t * size + me, sum - static_cast<float>(static_cast<int>(sum / 97) * 97));
    if (kMistake == kGridLeavesEarly && t + 2 == steps && blockIdx.x != 1) break;
    if (kMistake == kGridNoArrive && t == 1 && blockIdx.x == 1) continue;
    if (kMistake == kGridArriveWithoutBarrier) {
      if (threadIdx.x == 0) add_release(&barrier->arrived, 1);
    } else {
      grid_arrive(barrier);
    }
  }
  // As warps that wait each for itself do: the counters stay until the last of them has seen the end.
  if (kMistake == kNoGridMistake && threadIdx.x == blockDim.x - 1) wait_for_count(&barrier->arrived, steps * gridDim.x);
  if (kMistake != kGridNoLeave) grid_leave(barrier, gridDim.x);
}

}  // namespace

int launch_spread(float* y, GridBarrierState* state, int blocks, int threads, int steps, int cluster, int mistake,
                  void* stream) {
  GridBarrier* const barrier = reinterpret_cast<GridBarrier*>(state);
  const Placement placement{static_cast<unsigned>(cluster), mistake != kGridOrdinaryLaunch};
#define CASE(which)                                                                                                \
  case which:                                                                                                      \
    return FB_LAUNCH_PLACED((spread_kernel<which>), placement, dim3(blocks), dim3(threads), 0, stream, y, barrier, steps)
  switch (mistake) {
    CASE(kNoGridMistake);
    CASE(kGridNoWait);
    CASE(kGridWaitsForTooFew);
    CASE(kGridNoArrive);
    CASE(kGridArriveWithoutBarrier);
    CASE(kGridNoLeave);
    CASE(kGridLeavesEarly);
    CASE(kGridOrdinaryLaunch);
    CASE(kGridSleepsForever);
  }
#undef CASE
  return cudaErrorInvalidValue;
}
