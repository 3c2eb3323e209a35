// batch_norm_act in one launch: the blocks of a cluster hold the elements of a chunk of channels in shared memory from the
// reduction to the application, so that x (and dy) are read once. Equations: batch_norm_act.cuh.
//
//   a chunk        one contiguous channel, or some vectors of neighbouring channels (channels-last)
//   copy           cp.async of all that a thread visits, into a column of shared memory that is this thread's alone
//   reduce         thread, block, cluster (shared memory of the other blocks), in a fixed order
//   apply          from the column to global memory
//
// A column is read by the thread that filled it, so no barrier stands between copy and use. Where two blocks fit on a
// multiprocessor, one copies while the other applies. Without clusters (before sm_90) a chunk has one block.
#pragma once

#include "cuda/async_copy.h"
#include "cuda/batch_norm_act.cuh"
#include "cuda/cluster.h"

namespace fuseblock {

// Threads x of a block at most: vectors of neighbouring channels.
inline constexpr int kMostAcross = 32;

// Shared memory that reductions of so many values of a thread need beside the columns.
template <class S>
constexpr size_t reduction_bytes(int values) {
  return sizeof(S) * values * (kChannelThreads / 2 + 2 * kMostAcross);
}

// The blocks of a chunk and this one's number among them: its cluster, where there are clusters.
__device__ inline unsigned blocks_of_chunk() {
  if constexpr (kHasClusters) return cluster_size();
  else return 1;
}
__device__ inline unsigned rank_in_chunk() {
  if constexpr (kHasClusters) return cluster_rank();
  else return 0;
}

// Merges what threads y = 0 of a chunk's blocks have; all threads of all blocks get it. Blocks that return wait for
// leave_chunk() first: others may still read their shares. A block has at least as many threads y as a chunk has blocks.
template <class Merge, int M, class S>
__device__ void merge_blocks(S (&own)[M]) {
  FB_SHARED(S, share, [M][kMostAcross]);
  FB_SHARED(S, result, [M][kMostAcross]);
  const unsigned blocks = blocks_of_chunk(), x = threadIdx.x, y = threadIdx.y;
  if constexpr (kHasClusters) {
    if (blocks > 1) {
      if (y == 0) {
#pragma unroll
        for (int m = 0; m < M; ++m) share[m][x] = own[m];
      }
      cluster_sync();
      if (y < blocks) {
#pragma unroll
        for (int m = 0; m < M; ++m) own[m] = load_cluster<S>(cluster_address(&share[m][x], y));
      }
      cluster_arrive();
      merge_threads<Merge>(own, static_cast<int>(blocks));
    }
  }
  if (y == 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) result[m][x] = own[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) own[m] = result[m][x];
}

__device__ inline void leave_chunk() {
  if constexpr (kHasClusters) {
    if (blocks_of_chunk() > 1) cluster_wait();
  }
}

// This thread's column of shared memory: what it visits of one tensor, one visit behind the other.
template <class T, int N>
struct Column {
  Vec<T, N>* top;

  __device__ Vec<T, N>& operator[](int visit) const { return top[visit * blockDim.x * blockDim.y]; }

  template <int L>
  __device__ void copy(ChannelWalk<N, L> walk, const void* data) const {
    for (int visit = 0; walk.inside(); walk.next(), ++visit) {
      const T* const from = static_cast<const T*>(data) + walk.offset;
#pragma unroll
      for (int n = 0; n < N; n += kVectorWidth<T>) copy_async<16>(&(*this)[visit].element[n], from + n);
    }
  }
};

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 2) batch_norm_act_whole_fwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  using Visit = Vec<T, N>;
  FB_DYNAMIC_SHARED(Visit, columns);
  const Column<T, N> x{columns + threadIdx.y * blockDim.x + threadIdx.x};
  const unsigned blocks = blocks_of_chunk(), rank = rank_in_chunk();
  ChannelWalk<N, L> walk(op, blockIdx.x / blocks, rank);
  x.copy(walk, op.x);
  copy_async_wait_all();

  S own[2 * L + 1] = {};
  int visits = 0;
  for (ChannelWalk<N, L> at = walk; at.inside(); at.next(), ++visits) {
#pragma unroll
    for (int n = 0; n < N; ++n) own[1 + n % L] += x[visits][n];
  }
  own[0] = static_cast<S>(visits * (N / L));
#pragma unroll
  for (int l = 1; l <= L; ++l) own[l] /= visits > 0 ? own[0] : S(1);
  for (int visit = 0; visit < visits; ++visit) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const S deviation = x[visit][n] - own[1 + n % L];
      own[1 + L + n % L] += deviation * deviation;
    }
  }
  merge_threads<MergeMoments<L>>(own, blockDim.y);
  merge_blocks<MergeMoments<L>>(own);

  NormChannels<S, L> c(op, walk.operand, walk.has_channels);
#pragma unroll
  for (int l = 0; l < L; ++l) {
    c.mean.value[l] = own[1 + l];
    c.invstd.value[l] = inverse_root(own[1 + L + l] / own[0] + static_cast<S>(op.eps));
    if (rank == 0 && threadIdx.y == 0 && walk.has_channels) write_statistics(op, walk.operand + l, own[1 + l], own[1 + L + l]);
  }
  for (int visit = 0; walk.inside(); walk.next(), ++visit) normalise<T, N, L>(op, c, walk.offset, x[visit]);
  leave_chunk();
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 2)
    batch_norm_act_whole_bwd_kernel(const BatchNormAct op, int rows, int visits) {
  using S = State<T>;
  using Visit = Vec<T, N>;
  FB_DYNAMIC_SHARED(Visit, columns);
  const int threads = blockDim.x * blockDim.y;
  const Column<T, N> x{columns + threadIdx.y * blockDim.x + threadIdx.x}, dy{x.top + visits * threads};
  const unsigned blocks = blocks_of_chunk(), rank = rank_in_chunk();
  ChannelWalk<N, L> walk(op, blockIdx.x / blocks, rank);
  x.copy(walk, op.x);
  dy.copy(walk, op.dy);
  S sum[3 * L] = {};
  {
    const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
    ChannelWalk<N, L> at = walk;
    copy_async_wait_all();
    for (int visit = 0; at.inside(); at.next(), ++visit) {
      add_first_sums<T, N, L>(op, c, at.offset, x[visit], dy[visit], sum);
    }
  }
  merge_threads<AddSums>(sum, blockDim.y);
  merge_blocks<AddSums>(sum);

  if (rank == 0 && threadIdx.y == 0 && walk.has_channels) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int l = 0; l < L; ++l) {
        if (i < rows) write_sum(op, i, walk.operand + l, sum[i * L + l]);
      }
    }
  }
  // Loaded again: registers are scarce in between.
  const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
  ChannelValues<S, L> k[3];
#pragma unroll
  for (int l = 0; l < L; ++l) {
    k[0].value[l] = op.weight == nullptr ? c.invstd[l] : c.invstd[l] * c.weight[l];
    for (int i = 1; i < 3; ++i) k[i].value[l] = coefficient(op, k[0].value[l], sum[(i - 1) * L + l]);
  }
  for (int visit = 0; walk.inside(); walk.next(), ++visit) {
    write_gradients<T, N, L>(op, c, k, walk.offset, x[visit], dy[visit]);
  }
  leave_chunk();
}

}  // namespace fuseblock
