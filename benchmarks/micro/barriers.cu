// Barriers between blocks: of a grid, by the library's counter and by cooperative_groups; of a cluster.
//
// Blocks form a ring. In an exchange every block passes its number, plus 1, on to the next one; after k exchanges a block
// has the number of the block k places before it, plus k. The kernels with an exchange in every round measure a barrier as
// steps use it; the others exchange in the last round alone.
#include "cuda/cluster.h"
#include "micro.cuh"

#if !defined(FUSEBLOCK_EMULATE_CUDA)  // the emulator brings its own
#include <cooperative_groups.h>
#endif

namespace fuseblock::micro {

// Values pass from shared memory to shared memory.
struct ClusterRing {
  unsigned* slots;

  __device__ __forceinline__ void sync() { cluster_sync(); }
  __device__ __forceinline__ void put(int t, unsigned value) {
    store_cluster(cluster_address(&slots[t % 2], (cluster_rank() + 1) % cluster_size()), value);
  }
  __device__ __forceinline__ unsigned take(int t) const { return slots[t % 2]; }
  __device__ __forceinline__ void leave() {}
};

}  // namespace fuseblock::micro

namespace {

using namespace fuseblock;

// Values pass through L2. Two sets of slots take turns, so one barrier a round is enough.
struct GridSlots {
  unsigned* slots;

  __device__ __forceinline__ void put(int t, unsigned value) {
    store_l2(&slots[t % 2 * gridDim.x + (blockIdx.x + 1) % gridDim.x], value);
  }
  __device__ __forceinline__ unsigned take(int t) const { return load_l2(&slots[t % 2 * gridDim.x + blockIdx.x]); }
};

struct CounterRing : GridSlots {
  GridBarrier* barrier;
  unsigned arrivals = 0;

  __device__ explicit CounterRing(void* workspace)
      : GridSlots{reinterpret_cast<unsigned*>(static_cast<GridBarrier*>(workspace) + 1)},
        barrier(static_cast<GridBarrier*>(workspace)) {}
  __device__ __forceinline__ void sync() {
    grid_arrive(barrier);
    arrivals += gridDim.x;
    grid_wait(barrier, arrivals);
  }
  __device__ __forceinline__ void leave() { grid_leave(barrier, gridDim.x); }
};

struct CooperativeRing : GridSlots {
  __device__ explicit CooperativeRing(void* workspace) : GridSlots{static_cast<unsigned*>(workspace)} {}
  __device__ __forceinline__ void sync() { cooperative_groups::this_grid().sync(); }
  __device__ __forceinline__ void leave() {}
};

template <bool kExchange, class Ring>
__device__ __forceinline__ void go_round(const MicroLaunch& m, Ring ring) {
  unsigned value = blockIdx.x;
  ring.sync();
  const Stopwatch watch;
  for (int t = 0; t < m.rounds; ++t) {
    const bool exchange = (kExchange || t + 1 == m.rounds) && is_first_thread();
    if (exchange) ring.put(t, value + 1);
    ring.sync();
    if (exchange) value = ring.take(t);
  }
  watch.stop(m);
  if (is_first_thread()) static_cast<unsigned*>(m.result)[blockIdx.x] = value;
  ring.leave();
}

template <class Ring, bool kExchange>
__global__ void grid_kernel(const MicroLaunch m) {
  go_round<kExchange>(m, Ring(m.workspace));
}

template <bool kExchange>
__global__ void cluster_kernel(const MicroLaunch m) {
  if constexpr (kHasClusters) {
    FB_SHARED(unsigned, slots, [2]);
    go_round<kExchange>(m, micro::ClusterRing{slots});
  }
}

}  // namespace

FB_MICRO(grid_barrier, true, (grid_kernel<CounterRing, false>))
FB_MICRO(grid_exchange, true, (grid_kernel<CounterRing, true>))
FB_MICRO(grid_sync, true, (grid_kernel<CooperativeRing, false>))
FB_MICRO(cluster_barrier, false, (cluster_kernel<false>))
FB_MICRO(cluster_exchange, false, (cluster_kernel<true>))
