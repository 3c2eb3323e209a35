// All blocks read the same 32 KB from L2 in every round, as a step of the grid tier reads h: by loads, by bulk copies, and by
// bulk copies of which each block of a cluster issues a share for all of them. Two sources take turns.
#include "cuda/cluster.h"
#include "micro.cuh"

namespace {

using namespace fuseblock;

constexpr int kPieces = (32 << 10) / 16, kThreads = 256;

__device__ __forceinline__ unsigned mixed(const uint4& x) { return x.x ^ x.y ^ x.z ^ x.w; }

// The result of a thread is the sum of its pieces, mixed, over all rounds.
__global__ void __launch_bounds__(kThreads) gather_loads_kernel(const MicroLaunch m) {
  unsigned sum = 0;
  __syncthreads();
  const Stopwatch watch;
  for (int t = 0; t < m.rounds; ++t) {
    const uint4* const source = static_cast<const uint4*>(m.source) + t % 2 * kPieces;
    uint4 pieces[kPieces / kThreads];
#pragma unroll
    for (int n = 0; n < kPieces / kThreads; ++n) pieces[n] = load_l2(source + n * kThreads + threadIdx.x);
#pragma unroll
    for (int n = 0; n < kPieces / kThreads; ++n) sum += mixed(pieces[n]);
    __syncthreads();
  }
  watch.stop(m);
  static_cast<unsigned*>(m.result)[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// The result of a thread is the sum over all rounds of one piece in each, another one from round to round.
template <bool kMulticast>
__global__ void __launch_bounds__(kThreads) gather_copies_kernel(const MicroLaunch m) {
  if constexpr (kHasClusters) {
    using Tile = uint4[kPieces];
    FB_DYNAMIC_SHARED(Tile, tiles);  // two
    FB_SHARED(uint64_t, ready, [2]);
    const unsigned blocks = kMulticast ? cluster_size() : 1, share = kPieces / blocks;
    const unsigned first = kMulticast ? cluster_rank() * share : 0;
    const auto expect = [&](int t) {
      if (t < m.rounds) mbarrier_arrive_expect(&ready[t % 2], sizeof(Tile));
    };
    if (is_first_thread()) {
      mbarrier_init(&ready[0], 1);
      mbarrier_init(&ready[1], 1);
      fence_mbarrier_init();
      expect(0);
      expect(1);
    }
    cluster_sync();
    unsigned sum = 0;
    const Stopwatch watch;
    for (int t = 0; t < m.rounds; ++t) {
      Tile& tile = tiles[t % 2];
      if (is_first_thread()) {
        const uint4* const source = static_cast<const uint4*>(m.source) + t % 2 * kPieces + first;
        if constexpr (kMulticast) {
          const uint16_t all = static_cast<uint16_t>((1u << blocks) - 1);
          copy_bulk_multicast(&tile[first], source, share * sizeof(uint4), &ready[t % 2], all);
        } else {
          copy_bulk_shared(tile, source, sizeof(Tile), &ready[t % 2]);
        }
      }
      mbarrier_wait(&ready[t % 2], t / 2 % 2);
      sum += mixed(tile[(t * kThreads + threadIdx.x) % kPieces]);
      // That all shares of round t + 1 have come proves that all blocks were here in round t.
      fence_async_proxy();
      __syncthreads();
      if (is_first_thread()) expect(t + 2);
    }
    watch.stop(m);
    static_cast<unsigned*>(m.result)[blockIdx.x * kThreads + threadIdx.x] = sum;
    cluster_sync();
  }
}

}  // namespace

FB_MICRO(gather_loads, false, (gather_loads_kernel))
FB_MICRO(gather_copies, false, (gather_copies_kernel<false>))
FB_MICRO(gather_multicast, false, (gather_copies_kernel<true>))
