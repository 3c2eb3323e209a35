// Exchanges inside a cluster that mbarriers count: one value there and one back, and a step's all-to-all.
#include "cuda/cluster.h"
#include "micro.cuh"

namespace {

using namespace fuseblock;

// Two mbarriers and what they guard take turns: that all of round t + 1 has come proves that all have read round t.
struct Turns {
  uint64_t* ready;
  int rounds;
  uint32_t bytes;  // of a round

  // The block's first thread.
  __device__ __forceinline__ void begin() const {
    mbarrier_init(&ready[0], 1);
    mbarrier_init(&ready[1], 1);
    fence_mbarrier_init();
    expect(0);
    expect(1);
  }
  __device__ __forceinline__ void expect(int t) const {
    if (t < rounds) mbarrier_arrive_expect(&ready[t % 2], bytes);
  }
  __device__ __forceinline__ void wait(int t) const { mbarrier_wait(&ready[t % 2], t / 2 % 2); }
  __device__ __forceinline__ ClusterAddress of(int t, unsigned rank) const { return cluster_address(&ready[t % 2], rank); }
};

// Nobody returns while others may still send to it.
__device__ __forceinline__ void leave_cluster() {
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();
}

// Each block and the one half a cluster away swap 16 bytes; a round is one way. Values grow by 1 on every way.
__global__ void swap_kernel(const MicroLaunch m) {
  if constexpr (kHasClusters) {
    FB_SHARED(uint4, inbox, [2]);
    FB_SHARED(uint64_t, ready, [2]);
    const Turns turns{ready, m.rounds, sizeof(uint4)};
    const unsigned partner = cluster_rank() ^ (cluster_size() / 2);
    if (is_first_thread()) turns.begin();
    cluster_sync();
    uint4 value{blockIdx.x, 0, 0, 0};
    const Stopwatch watch;
    if (is_first_thread()) {
      for (int t = 0; t < m.rounds; ++t) {
        value.x += 1;
        store_async(cluster_address(&inbox[t % 2], partner), value, turns.of(t, partner));
        turns.wait(t);
        value = inbox[t % 2];
        turns.expect(t + 2);
      }
      static_cast<unsigned*>(m.result)[blockIdx.x] = value.x;
    }
    watch.stop(m);
    leave_cluster();
  }
}

// Every block sends a slice of 512 bytes, 8 rows of 32 units of 16 bits, to every block of the cluster and itself. The next
// slice is that of the block t places further on, plus 1. The result is all that was received last.
template <bool kCopies>
__global__ void all_to_all_kernel(const MicroLaunch m) {
  if constexpr (kHasClusters) {
    constexpr int kPieces = 32, kMost = 16;  // of 16 bytes in a slice; slices
    using Slices = uint4[kMost][kPieces];
    FB_DYNAMIC_SHARED(Slices, received);
    FB_SHARED(uint4, stage, [2][kPieces]);
    FB_SHARED(uint64_t, ready, [2]);
    const unsigned rank = cluster_rank(), size = cluster_size(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Turns turns{ready, m.rounds, static_cast<uint32_t>(size * sizeof(uint4[kPieces]))};
    if (is_first_thread()) turns.begin();
    cluster_sync();
    const unsigned first = (blockIdx.x * kPieces + lane) * 4;
    uint4 piece{first, first + 1, first + 2, first + 3};
    const Stopwatch watch;
    for (int t = 0; t < m.rounds; ++t) {
      uint4* const slice = received[t % 2][rank];
      if constexpr (kCopies) {
        // When round t has come from everyone, the copies of round t - 1 have left their stage.
        if (warp == 0) {
          stage[t % 2][lane] = piece;
          fence_async_proxy();
          __syncwarp();
          if (lane < size) {
            copy_bulk_cluster(cluster_address(slice, lane), stage[t % 2], sizeof(uint4[kPieces]), turns.of(t, lane));
          }
        }
      } else {
        for (unsigned peer = warp; peer < size; peer += blockDim.x / 32) {
          store_async(cluster_address(&slice[lane], peer), piece, turns.of(t, peer));
        }
      }
      turns.wait(t);
      piece = received[t % 2][(rank + t) % size][lane];
      piece = {piece.x + 1, piece.y + 1, piece.z + 1, piece.w + 1};
      __syncthreads();
      if (is_first_thread()) turns.expect(t + 2);
    }
    watch.stop(m);
    uint4* const result = static_cast<uint4*>(m.result) + blockIdx.x * size * kPieces;
    for (unsigned n = threadIdx.x; n < size * kPieces; n += blockDim.x) {
      result[n] = received[(m.rounds - 1) % 2][n / kPieces][n % kPieces];
    }
    leave_cluster();
  }
}

}  // namespace

FB_MICRO(swap, false, (swap_kernel))
FB_MICRO(all_to_all_stores, false, (all_to_all_kernel<false>))
FB_MICRO(all_to_all_copies, false, (all_to_all_kernel<true>))
