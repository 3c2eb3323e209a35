// Self-tests of cluster.h and mbarrier.h: a recurrence whose state is spread over a cluster. nvcc compiles this file too.
#include "cluster.h"

#include "cuda/cluster.h"

namespace {

using namespace fuseblock;

// Step t: every block needs the whole state h_t and makes its own slice of h_{t+1}, which goes to all blocks.
//
// Buffer t % 2 of h is written again only after everyone has sent h_{t+1}, so has read h_t. A slice is sent from stage
// t % 2: that the copies of h_{t+1} have left it is known when h_{t+2} has come from everyone, which needed h_{t+1}.
template <int kTransport, int kMistake>
__device__ __forceinline__ void gather(float* y, int steps) {
  constexpr bool kCounted = kTransport == kBulk || kTransport == kStoreAsync;  // bytes, else arrivals
  FB_SHARED(float4, h4, [2][16 * kSlice / 4]);
  FB_SHARED(float4, stage4, [2][kSlice / 4]);
  FB_SHARED(uint64_t, ready, [2]);
  const auto h = [&](int t) { return reinterpret_cast<float*>(h4[kMistake == kSingleBuffer ? 0 : t % 2]); };
  const auto stage = [&](int t) { return reinterpret_cast<float*>(stage4[kMistake == kSingleStage ? 0 : t % 2]); };
  const int thread = threadIdx.x, blocks = cluster_size(), rank = cluster_rank(), size = blocks * kSlice;
  const int bytes = size * 4 + (kMistake == kTooFewBytes ? -4 : kMistake == kTooManyBytes ? 4 : 0);
  y += blockIdx.x / blocks * steps * size;

  const auto expect = [&](int t) {
    if (kCounted && thread == 0 && kMistake != kNoArrive && t < steps) mbarrier_arrive_expect(&ready[t % 2], bytes);
  };
  if (thread == 0 && kMistake != kNotInitialised) {
    for (uint64_t& barrier : ready) mbarrier_init(&barrier, kCounted ? 1 : blocks);
    if (kMistake == kInitTwice) mbarrier_init(&ready[0], 1);
    if (kMistake != kNoInitFence) fence_mbarrier_init();
  }
  if (kMistake == kOverwritten && thread == 1) ready[1] = 0;
  for (int n = thread; n < size; n += blockDim.x) h(0)[n] = static_cast<float>(n);
  if (kMistake != kNoStart) cluster_sync();
  if (kMistake == kUnpaired) cluster_wait();
  expect(1);  // h_0 is there
  expect(2);
  for (int t = 0; t < steps; ++t) {
    if (t > 0) {
      const int parity = (t - 1) / 2 % 2 ^ (kMistake == kWrongParity ? 1 : 0);
      if (kTransport == kStoreAndBarrier) {
        cluster_sync();
      } else if (kTransport == kStoreAndArrive) {
        mbarrier_wait_cluster(&ready[t % 2], parity);
      } else if (kMistake != kNoWait) {
        mbarrier_wait(&ready[t % 2], parity);
      }
      if (kMistake == kArriveTwice && thread == 0) mbarrier_arrive(&ready[t % 2]);
      expect(t + 2);
    }
    if (thread < kSlice) {
      const int unit = rank * kSlice + thread;
      float sum = 0;
      for (int n = 0; n < size; ++n) sum += h(t)[n] * static_cast<float>((n + unit) % 5 + 1);
      const float next = sum - static_cast<float>(static_cast<int>(sum / 97) * 97);
      stage(t)[thread] = next;
      y[t * size + unit] = next;
    }
    if (kMistake != kNoProxyFence || t < 4) fence_async_proxy();
    __syncthreads();
    if (t + 1 == steps) break;
    float* const to = h(t + 1) + rank * kSlice;
    uint64_t* const barrier = &ready[(t + 1) % 2];
    if (kTransport == kBulk) {
      if (thread < blocks) {
        const int offset = kMistake == kBeyond ? 2 * 16 * kSlice * 4 : 0;
        copy_bulk_cluster(cluster_address(to, kMistake == kNoSuchBlock ? blocks : thread) + offset, stage(t),
                          kMistake == kOddSize ? 24 : kSlice * sizeof(float),
                          cluster_address(barrier, kMistake == kForeignMBarrier ? 0 : thread));
      }
    } else if (thread < kSlice) {
      for (int peer = 0; peer < blocks; ++peer) {
        const ClusterAddress there = cluster_address(to + thread, peer);
        if (kTransport == kStoreAsync) {
          store_async(there, stage(t)[thread], cluster_address(barrier, peer));
        } else {
          store_cluster(there, stage(t)[thread]);
        }
      }
    }
    if (kTransport == kStoreAndArrive) {
      __syncthreads();
      if (thread < blocks) mbarrier_arrive_cluster(cluster_address(barrier, thread));
    }
  }
  if (kMistake == kEarlyExit) return;
  cluster_arrive_relaxed();
  cluster_wait();
}

template <int kTransport, int kMistake>
__global__ void gather_kernel(float* y, int steps) {
  if constexpr (kHasClusters) gather<kTransport, kMistake>(y, steps);
}

template <bool kWait>
__global__ void multicast_kernel(const float* x, float* y) {
  if constexpr (kHasClusters) {
    FB_SHARED(float4, tile4, [16]);
    FB_SHARED(uint64_t, ready, [1]);
    float* const tile = reinterpret_cast<float*>(tile4);
    const int thread = threadIdx.x;
    if (thread == 0) {
      mbarrier_init(ready, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect(ready, 64 * sizeof(float));
    }
    cluster_sync();
    if (thread == 0 && cluster_rank() == 0) {
      copy_bulk_multicast(tile, x, 32 * sizeof(float), ready, static_cast<uint16_t>((1u << cluster_size()) - 1));
    }
    if (thread == 0) copy_bulk_shared(tile + 32, x + 32, 32 * sizeof(float), ready);
    mbarrier_wait(ready, 0);
    tile[thread] += static_cast<float>(cluster_rank());
    fence_async_proxy();
    __syncthreads();
    if (thread == 0) {
      copy_bulk_global(y + blockIdx.x * 64, tile, 64 * sizeof(float));
      copy_bulk_commit();
      if (kWait) copy_bulk_wait_read<0>();
    }
    cluster_sync();
    // Read from the neighbour, who is still there.
    const float other = load_cluster<float>(cluster_address(tile + thread, (cluster_rank() + 1) % cluster_size()));
    if (other < 0) y[0] = other;
    cluster_sync();
  }
}

template <int kTransport, int kMistake = kNoClusterMistake>
cudaError_t run_gather(float* y, int cluster, int clusters, int steps, void* stream) {
  return FB_LAUNCH_PLACED((gather_kernel<kTransport, kMistake>), (Placement{static_cast<unsigned>(cluster)}),
                          dim3(cluster * clusters), dim3(32), 0, stream, y, steps);
}

}  // namespace

int launch_gather(float* y, int cluster, int clusters, int steps, int transport, int mistake, void* stream) {
  if (transport == kStoreAsync) return run_gather<kStoreAsync>(y, cluster, clusters, steps, stream);
  if (transport == kStoreAndArrive) return run_gather<kStoreAndArrive>(y, cluster, clusters, steps, stream);
  if (transport == kStoreAndBarrier) return run_gather<kStoreAndBarrier>(y, cluster, clusters, steps, stream);
#define CASE(which) \
  case which:       \
    return run_gather<kBulk, which>(y, cluster, clusters, steps, stream)
  switch (mistake) {
    CASE(kNoClusterMistake);
    CASE(kNoWait);
    CASE(kWrongParity);
    CASE(kSingleBuffer);
    CASE(kSingleStage);
    CASE(kNoArrive);
    CASE(kTooFewBytes);
    CASE(kTooManyBytes);
    CASE(kEarlyExit);
    CASE(kNoStart);
    CASE(kForeignMBarrier);
    CASE(kArriveTwice);
    CASE(kInitTwice);
    CASE(kNotInitialised);
    CASE(kOverwritten);
    CASE(kBeyond);
    CASE(kOddSize);
    CASE(kNoSuchBlock);
    CASE(kUnpaired);
    CASE(kNoInitFence);
    CASE(kNoProxyFence);
  }
#undef CASE
  return cudaErrorInvalidValue;
}

int launch_multicast(const float* x, float* y, int cluster, int blocks, bool wait, void* stream) {
  const Placement placement{static_cast<unsigned>(cluster)};
  if (wait) return FB_LAUNCH_PLACED((multicast_kernel<true>), placement, dim3(blocks), dim3(64), 0, stream, x, y);
  return FB_LAUNCH_PLACED((multicast_kernel<false>), placement, dim3(blocks), dim3(64), 0, stream, x, y);
}

int resident_gather(int cluster, bool cooperative, int shared_bytes, const char** refusal) {
  const Placement placement{static_cast<unsigned>(cluster), cooperative};
  const Residency found = FB_RESIDENT_BLOCKS((gather_kernel<kBulk, kNoClusterMistake>), placement, dim3(256),
                                             static_cast<size_t>(shared_bytes));
  *refusal = found.refusal;
  return found.blocks;
}
