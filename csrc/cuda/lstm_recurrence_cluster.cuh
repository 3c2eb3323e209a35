// What both kernels of the cluster tier are made of: who owns what, and which kernel is launched.
//
//   H         padded hidden size; a block of the cluster owns H / C units, in all four gates
//   warp      owns cells of 8 units (its group); kParts warps of a group share the work of the product
//   kTiles    batch rows of a cluster in units of 8: 1 or 2
#pragma once

#include "cuda/cluster.h"
#include "cuda/lstm_recurrence_cluster.h"
#include "cuda/lstm_recurrence_tiles.cuh"

namespace fuseblock::lstm_cluster {

using namespace lstm_recurrence;

template <int H, int C, int P, int R, int R1 = 0, int R2 = 0>
struct Class {
  static constexpr int kHidden = H, kCluster = C, kParts = P;
  static constexpr bool kHasAligned = R1 > 0;  // kernels, for one tile and for two
  static constexpr int registers(int tiles, bool aligned) { return !aligned ? R : tiles == 1 ? R1 : R2; }
  static constexpr int kUnits = H / C, kGroups = kUnits / kTileUnits;  // of a block
  static constexpr int kWarps = kGroups * kParts, kThreads = 32 * kWarps;
  static_assert(kGroups * kTileUnits * C == H);
};

inline constexpr size_t kMostSharedBytes = 227 * 1024;  // of a block, where there are clusters

// Where a warp stands. The row tiles of a group are dealt to its parts in turns; a part owns at most kCells of them.
template <class Class, int kTiles>
struct Warp : Lane {
  static constexpr int kCells = (kTiles + Class::kParts - 1) / Class::kParts;

  int warp = threadIdx.x / 32, group = warp % Class::kGroups, part = warp / Class::kGroups;
  int block = static_cast<int>(cluster_rank());
  int first_unit = block * Class::kUnits + group * kTileUnits;
  bool has_cells = part < kTiles;

  __device__ int tile(int cell) const { return cell * Class::kParts + part; }
};

// The phases of two mbarriers in turns, each of which counts the bytes that a step brings: `count` steps, from 0 on.
struct Arrivals {
  uint64_t* ready;  // [2]
  uint32_t bytes;
  int count;

  // One thread, before the cluster's first barrier.
  __device__ void init() const {
    for (int n = 0; n < 2; ++n) mbarrier_init(&ready[n], 1);
    fence_mbarrier_init();
    expect(0);
    expect(1);
  }
  // All threads that read what arrives; one thread of them also says what is to come.
  __device__ void wait(int step) const {
    mbarrier_wait_cluster(&ready[step % 2], step / 2 % 2);  // stores of other blocks are released to the cluster
    if (threadIdx.x == 0) expect(step + 2);
  }

 private:
  __device__ void expect(int step) const {
    if (step < count) mbarrier_arrive_expect(&ready[step % 2], bytes);
  }
};

// Calls run.operator()<Class>() for the smallest class that holds H.
template <class T, class Run>
int with_class(int64_t hidden, int otherwise, Run run) {
#define FB_LSTM_CLUSTER_CASE(...) \
  if (hidden <= Class<__VA_ARGS__>::kHidden) return run.template operator()<Class<__VA_ARGS__>>();
  if constexpr (std::is_same_v<T, float>) {
    FB_LSTM_CLUSTER_FLOAT32_CLASSES(FB_LSTM_CLUSTER_CASE)
  } else {
    FB_LSTM_CLUSTER_CLASSES(FB_LSTM_CLUSTER_CASE)
  }
#undef FB_LSTM_CLUSTER_CASE
  return otherwise;
}

// Calls launch.operator()<Class, kTiles, kAligned>(grid) for the kernel that fits; cudaSuccess where there is nothing to do. Two
// tiles of rows share the weights of a cluster, but not its time: they pay where not all have a cluster of their own.
// `one_tile`: never two.
template <class T, class Launch>
int dispatch(const LstmShape& shape, const void* w_hh, bool aligned, bool one_tile, Launch launch) {
  const bool valid = shape.steps > 0 && shape.steps <= INT32_MAX && shape.batch >= 0 && shape.hidden >= 0 &&
                     (shape.directions == 1 || shape.directions == 2);
  if (!valid || !are_aligned({w_hh})) return cudaErrorInvalidValue;
  return with_class<T>(shape.hidden, cudaErrorInvalidValue, [&]<class Class>() -> int {
    if (shape.batch == 0 || shape.hidden == 0) return cudaSuccess;
    const int64_t tiles = (shape.batch + kTileRows - 1) / kTileRows;
    const bool two = Class::kHasAligned && aligned && !one_tile &&
                     tiles * shape.directions > shape.multiprocessors / Class::kCluster;
    const int64_t blocks = (two ? (tiles + 1) / 2 : tiles) * Class::kCluster;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shape.directions));
    if constexpr (Class::kHasAligned) {
      if (two) return launch.template operator()<Class, 2, true>(grid);
      if (aligned) return launch.template operator()<Class, 1, true>(grid);
    }
    return launch.template operator()<Class, 1, false>(grid);
  });
}

// The float32 instances are in files of their own.
int run_float32(const LstmFwd& op, void* stream);
int run_float32(const LstmBwd& op, void* stream);
int resident_fwd_float32(int64_t hidden);
int resident_bwd_float32(int64_t hidden);

}  // namespace fuseblock::lstm_cluster
