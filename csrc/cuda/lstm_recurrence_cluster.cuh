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

template <int H, int C, int P, int R1, int R2, int R3>
struct Class {
  static constexpr int kHidden = H, kCluster = C, kParts = P;
  static constexpr int registers(int tiles, bool aligned) { return tiles == 2 ? R2 : aligned ? R1 : R3; }
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

// Calls run.operator()<T, Class>() for the smallest class that holds H.
template <class Run>
int with_class(int64_t hidden, int dtype, int otherwise, Run run) {
#define FB_LSTM_CLUSTER_CASE(H, ...)                                                              \
  if (hidden <= H) {                                                                              \
    if (dtype == kFloat16) return run.template operator()<__half, Class<H, __VA_ARGS__>>();         \
    if (dtype == kBFloat16) return run.template operator()<__nv_bfloat16, Class<H, __VA_ARGS__>>(); \
  }
  FB_LSTM_CLUSTER_CLASSES(FB_LSTM_CLUSTER_CASE)
#undef FB_LSTM_CLUSTER_CASE
  return otherwise;
}

// Calls launch.operator()<T, Class, kTiles, kAligned>(grid) for the kernel that fits; cudaSuccess where there is nothing to
// do. Two tiles of rows share the weights of a cluster, but not its time: they pay where not all have a cluster of their own.
// aligned(elements of 16 bytes): whether tensors are. `one_tile`: never two.
template <class Aligned, class Launch>
int dispatch(const LstmShape& shape, int dtype, const void* w_hh, Aligned aligned, bool one_tile, Launch launch) {
  const bool valid = shape.steps > 0 && shape.steps <= INT32_MAX && shape.batch >= 0 && shape.hidden >= 0 &&
                     (shape.directions == 1 || shape.directions == 2);
  if (!valid || !are_aligned({w_hh})) return cudaErrorInvalidValue;
  return with_class(shape.hidden, dtype, cudaErrorInvalidValue, [&]<class T, class Class>() -> int {
    if (shape.batch == 0 || shape.hidden == 0) return cudaSuccess;
    const int64_t tiles = (shape.batch + kTileRows - 1) / kTileRows;
    const bool pieces = aligned(kVectorWidth<T>);
    const bool two = pieces && !one_tile && tiles * shape.directions > shape.multiprocessors / Class::kCluster;
    const int64_t blocks = (two ? (tiles + 1) / 2 : tiles) * Class::kCluster;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shape.directions));
    if (two) return launch.template operator()<T, Class, 2, true>(grid);
    return pieces ? launch.template operator()<T, Class, 1, true>(grid) : launch.template operator()<T, Class, 1, false>(grid);
  });
}

}  // namespace fuseblock::lstm_cluster
