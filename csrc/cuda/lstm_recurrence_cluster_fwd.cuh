// The cluster tier's forward kernel. A block computes the gates of its units from all of h, and sends its part of the new h
// to every block of the cluster.
//
// Nothing in the time loop waits for more than it needs: a warp for h, the owners of cells for the other parts of their sums.
// Two buffers of h and one of sums are enough, without anybody saying that they are free:
//
//   h       somebody writes h_{t+2} over h_t after all of h_{t+1} has come. Each warp that owns cells has sent its piece of
//           h_{t+1} after its own parts' sums, which came after those parts had read h_t. So all have read it
//   sums    a part writes sums of step t + 1 after all of h_{t+1} has come, with the piece that is made of its sums of step t
//
// A block returns when all that others send to it has arrived, since it waits for every h that is sent.
#pragma once

#include "cuda/lstm_recurrence_cluster.cuh"
#include "cuda/named_barrier.h"

namespace fuseblock::lstm_cluster {

template <class T, class Class, int kTiles, bool kAligned>
struct ForwardMemory {
  static constexpr int kSteps = Class::kHidden / kStep<T> / Class::kParts;  // operand steps of a part
  using Weights = ResidentTiles<2 * kSteps, Class::registers(kTiles, kAligned)>;
  using Parts = Sums[Class::kParts][2][32];

  Core<T> h[2][kTiles][Class::kHidden / kVectorWidth<T>];  // of the step before and of this one, in turns
  Stage<T> stage[Class::kGroups][kTiles];
  alignas(16) uint64_t ready[2];

  // Behind this struct, where there are any: sums that parts make for each other, and weights.
  static constexpr int kSumBytes = Class::kParts == 1 ? 0 : Class::kGroups * kTiles * static_cast<int>(sizeof(Parts));
  static constexpr int kWeightBytes = Class::kWarps * Weights::kBytes;

  static constexpr size_t bytes() { return sizeof(ForwardMemory) + kSumBytes + kWeightBytes; }
  __device__ Parts* sums(int group) { return reinterpret_cast<Parts*>(this + 1) + group * kTiles; }
  __device__ void* weights(int warp) { return reinterpret_cast<char*>(this + 1) + kSumBytes + warp * Weights::kBytes; }
};

template <class T, class Class, int kTiles, bool kAligned, int kPasses>
__device__ __forceinline__ void forward(const LstmFwd& op, bool aligned) {
  using Memory = ForwardMemory<T, Class, kTiles, kAligned>;
  using Is = Warp<Class, kTiles>;
  constexpr int kRows = kTiles * kTileRows, kSteps = Memory::kSteps, kCells = Is::kCells;
  constexpr int kWidth = kVectorWidth<T>, kCores = Class::kHidden / kWidth;
  constexpr int kPiece = kPasses == 3 && kSteps % 8 == 0 ? 8 : kSteps;  // or three passes are less accurate than float32
  FB_DYNAMIC_SHARED(Memory, shared);

  const Is me;
  const Slice<true> slice(op.shape, blockIdx.y, static_cast<int64_t>(blockIdx.x / Class::kCluster) * kRows, kRows);
  auto gx = slice.sequence(static_cast<const T*>(op.gx.data), kGates, op.gx.step_stride, op.gx.row_stride);
  auto y = slice.sequence(static_cast<T*>(op.y), 1);
  auto saved_gates = slice.sequence(static_cast<T*>(op.gates), kGates);
  auto saved_c = slice.sequence(op.c, 1);
  const bool saves = op.gates != nullptr;

  // Before the first step: the weights, for good; all of h0; c0 and the first gx of the warp's cells.
  typename Memory::Weights weights;
  weights.load(shared->weights(me.warp), me, [&](int n) {
    const int k = (me.part * kSteps + n / 2) * kStep<T>;
    return forward_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, n % 2, me.first_unit, k, me);
  });
  const auto h0 = slice.state(static_cast<const T*>(op.h0));
  for (int n = threadIdx.x; n < kTiles * kCores * kTileRows; n += Class::kThreads) {
    const int row = n % kTileRows, core = n / kTileRows % kCores, tile = n / kTileRows / kCores;
    shared->h[0][tile][core].row[row] = load_piece(h0, aligned, tile * kTileRows + row, core * kWidth);
  }
  const Arrivals arrivals{shared->ready, sizeof(shared->h[0]), slice.steps - 1};
  if (threadIdx.x == 0) arrivals.init();

  Pieces<T, kGates> arriving[kCells];
  Vec<T, 2> h[kCells];
  Vec<float, 2> c[kCells];
  int length[kCells][2], piece_length[kCells];
  if (me.has_cells) {
    const auto c0 = slice.state(op.c0);
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      const int first_row = me.tile(n) * kTileRows, row = first_row + me.row, unit = me.first_unit + me.unit;
      arriving[n].load(gx, aligned, first_row, me.first_unit, me);
      arriving[n].put(shared->stage[me.group][me.tile(n)].gates, me);
      h[n] = load_cells<T>(h0, row, unit);
      c[n] = load_cells<float>(c0, row, unit);
      for (int r = 0; r < 2; ++r) length[n][r] = slice.length(row + r, unit);
      piece_length[n] = slice.length(first_row + me.index % kTileRows);
    }
  }
  cluster_sync();

  for (int step = 0; step < slice.steps; ++step) {
    const int t = slice.time(step);
    // Asked for now, needed at the end of the step.
    gx.move(1);
    if (step + 1 < slice.steps && me.has_cells) {
#pragma unroll
      for (int n = 0; n < kCells; ++n) arriving[n].load(gx, aligned, me.tile(n) * kTileRows, me.first_unit, me);
    }
    if (step > 0) arrivals.wait(step - 1);

    // W h for all rows: gates i and f, and g and o, of 8 units.
    Sums sum[kTiles][2], own[kCells][2];
    multiply_all<T, kPasses, kSteps, kPiece>(sum, weights, &shared->h[step % 2][0][me.part * kSteps * 2], kCores, me);
    add_parts(own, sum, shared->sums(me.group), me.part, 1 + me.group, me);
    if (!me.has_cells) continue;

    // The lane's own cells: all four gates of each are in its registers.
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      const int tile = me.tile(n), first_row = tile * kTileRows;
      Stage<T>& stage = shared->stage[me.group][tile];
      const GateVecs<T, 2> from_input = get_gates(stage.gates, me);
      GateVecs<T, 2> activated = zero_gates<T, 2>();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (t < length[n][r]) {
          const Gates<float> x = from_input[r], w = gates_of(own[n], r);
          const Gates<float> s = activate(Gates<float>{x.i + w.i, x.f + w.f, x.g + w.g, x.o + w.o});
          const float c_new = s.f * c[n][r] + s.i * s.g;
          c[n].set(r, c_new);
          h[n].set(r, s.o * tanh_(c_new));
          activated.set(r, s);
        }
      }

      // The new h, first of all, to all blocks: each lane has a piece for some of them.
      put_cells(stage.units, h[n], me);
      __syncwarp();
      constexpr int kPieces = kTileCores<T> * kTileRows;
      const int index = me.index % kPieces, core = index / kTileRows, row = index % kTileRows;
      const Vec<T, kWidth> piece = stage.units[core].row[row];
      if (step + 1 < slice.steps) {
        const auto* const to = &shared->h[(step + 1) % 2][tile][me.first_unit / kWidth + core].row[row];
#pragma unroll
        for (int block = me.index / kPieces; block < Class::kCluster; block += 32 / kPieces) {
          store_async(cluster_address(to, block), piece, cluster_address(&shared->ready[step % 2], block));
        }
      }
      if (me.index < kPieces) {
        store_piece(y, aligned, first_row + row, me.first_unit + core * kWidth,
                    t < piece_length[n] ? piece : zeros<T, kWidth>());
      }
      if (saves) {
        put_gates(stage.gates, kTileCores<T>, activated, me);
        store_cells(saved_c, first_row + me.row, me.first_unit + me.unit, c[n]);
        __syncwarp();
        Pieces<T, kGates>::store(stage.gates, kTileCores<T>, saved_gates, aligned, first_row, me.first_unit, me);
      }
      arriving[n].put(stage.gates, me);  // where this very lane has just taken its pieces from
    }
    __syncwarp();
    y.move(1);
    saved_gates.move(1);
    saved_c.move(1);
  }

  if (!me.has_cells) return;
#pragma unroll
  for (int n = 0; n < kCells; ++n) {
    const int row = me.tile(n) * kTileRows + me.row, unit = me.first_unit + me.unit;
    store_cells(slice.state(static_cast<T*>(op.h_n)), row, unit, h[n]);
    store_cells(slice.state(op.c_n), row, unit, c[n]);
  }
}

// kAligned: known when compiled, else `aligned` says.
template <class T, class Class, int kTiles, bool kAligned, int kPasses>
__global__ void __launch_bounds__(Class::kThreads, 1) lstm_cluster_fwd_kernel(const LstmFwd op, const bool aligned) {
  if constexpr (kHasClusters) forward<T, Class, kTiles, kAligned, kPasses>(op, kAligned || aligned);
}

// Blocks that run at the same time, of the kernel that takes most shared memory.
template <class T>
int resident_fwd(int64_t hidden) {
  return with_class<T>(hidden, 0, [&]<class Class>() {
    constexpr bool kAligned = Class::kHasAligned;
    constexpr int kTiles = kAligned ? 2 : 1;
    return FB_RESIDENT_BLOCKS((lstm_cluster_fwd_kernel<T, Class, kTiles, kAligned, 1>), Placement{Class::kCluster},
                              dim3(Class::kThreads), (ForwardMemory<T, Class, kTiles, kAligned>::bytes()))
        .blocks;
  });
}

template <class T, int kPasses>
int run(const LstmFwd& op, void* stream) {
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  constexpr int kWidth = kVectorWidth<T>;
  const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.gx, kWidth) && are_aligned({op.h0, op.y, op.gates});
  return dispatch<T>(op.shape, op.w_hh, aligned, false, [&]<class Class, int kTiles, bool kAligned>(dim3 grid) {
    constexpr size_t kBytes = ForwardMemory<T, Class, kTiles, kAligned>::bytes();
    static_assert(kBytes <= kMostSharedBytes);
    return FB_LAUNCH_PLACED((lstm_cluster_fwd_kernel<T, Class, kTiles, kAligned, kPasses>), Placement{Class::kCluster}, grid,
                            dim3(Class::kThreads), kBytes, stream, op, aligned);
  });
}

}  // namespace fuseblock::lstm_cluster
