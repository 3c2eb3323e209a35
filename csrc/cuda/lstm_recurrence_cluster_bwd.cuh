// The cluster tier's backward kernel: dh (of the step before) = W_hh^T dgates.
//
// A block knows dgates of its own units, and multiplies them by its columns of W_hh^T: shares of dh of all units, which it
// sends to their owners. (To gather dgates instead would move four times as much.) An owner has a slot for each sender and
// adds them up in their order, so results do not depend on who comes first.
//
// Two buffers of everything are enough, without anybody saying that they are free; turn n is the n-th step from the end:
//
//   dgates  a warp writes those of turn n + 2 after the barrier of turn n + 1, to which all come after they have read turn n's
//   dh      somebody writes shares of turn n + 2 after all of turn n + 1's have come to it. Their senders sent them after the
//           barrier of turn n + 1, to which the warps that read turn n's shares have come after they had read them
//
// A block returns when all that others send to it has arrived, since it waits for the shares of every turn.
#pragma once

#include "cuda/lstm_recurrence_cluster.cuh"

namespace fuseblock::lstm_cluster {

template <class T, class Class, int kTiles, bool kAligned>
struct BackwardMemory {
  static constexpr int kResults = Class::kHidden / 16 / Class::kWarps;  // of a warp: tiles of 16 units of dh
  static constexpr int kSteps = kGates * Class::kUnits / kStep<T>;
  static constexpr int kGateCores = Class::kUnits / kVectorWidth<T>;
  using Weights = ResidentTiles<kResults * kSteps, Class::registers(kTiles, kAligned)>;
  static_assert(kResults * 16 * Class::kWarps == Class::kHidden && kSteps * kStep<T> == kGates * Class::kUnits);

  Core<T> dgates[2][kTiles][kGates * kGateCores];
  Sums dh[2][Class::kCluster][kTiles][Class::kGroups][16];  // by sender; two units in two rows each, as mma leaves them
  Stage<T> stage[Class::kGroups][kTiles];
  alignas(16) uint64_t ready[2];

  // Behind this struct, where there are any: weights.
  static constexpr size_t bytes() { return sizeof(BackwardMemory) + Class::kWarps * Weights::kBytes; }
  __device__ void* weights(int warp) { return reinterpret_cast<char*>(this + 1) + warp * Weights::kBytes; }
};

template <class T, class Class, int kTiles, bool kAligned, int kPasses>
__device__ __forceinline__ void backward(const LstmBwd& op, bool aligned) {
  using Memory = BackwardMemory<T, Class, kTiles, kAligned>;
  using Is = Warp<Class, kTiles>;
  constexpr int kRows = kTiles * kTileRows, kCells = Is::kCells;
  constexpr bool kExtras = kTiles == 1;  // d_gates and d_c may be there
  FB_DYNAMIC_SHARED(Memory, shared);

  const Is me;
  const Slice<true> slice(op.shape, blockIdx.y, static_cast<int64_t>(blockIdx.x / Class::kCluster) * kRows, kRows);
  const int last = slice.steps - 1, unit = me.first_unit + me.unit;
  auto saved_gates = slice.sequence(static_cast<const T*>(op.gates), kGates);
  auto saved_c = slice.sequence(op.c, 1);
  auto dy = slice.sequence(static_cast<const T*>(op.dy.data), 1, op.dy.step_stride, op.dy.row_stride);
  auto d_gates = slice.sequence(static_cast<const T*>(op.d_gates), kGates);
  auto d_c = slice.sequence(op.d_c, 1);
  auto dgx = slice.sequence(static_cast<T*>(op.dgx), kGates);
  saved_gates.move(last);
  saved_c.move(last);
  dy.move(last);
  d_gates.move(last);
  d_c.move(last);
  dgx.move(last);
  const bool has_dy = op.dy.data != nullptr;

  typename Memory::Weights weights;
  weights.load(shared->weights(me.warp), me, [&](int n) {
    const int result = (me.warp * Memory::kResults + n % Memory::kResults) * 16, k = n / Memory::kResults * kStep<T>;
    return backward_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, result, me.block * Class::kUnits, Class::kUnits,
                                     k, me);
  });
  const Arrivals arrivals{shared->ready, sizeof(shared->dh[0]), slice.steps};
  if (threadIdx.x == 0) arrivals.init();

  // What a turn takes from memory, and where the owners of cells find it.
  Pieces<T, kGates> arriving[kCells];
  Pieces<T, 1> arriving_dy[kCells];
  const auto ask = [&] {
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      arriving[n].load(saved_gates, aligned, me.tile(n) * kTileRows, me.first_unit, me);
      if (has_dy) arriving_dy[n].load(dy, aligned, me.tile(n) * kTileRows, me.first_unit, me);
    }
  };
  const auto put = [&] {
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      arriving[n].put(shared->stage[me.group][me.tile(n)].gates, me);
      if (has_dy) arriving_dy[n].put(shared->stage[me.group][me.tile(n)].units, me);
    }
    __syncwarp();
  };
  const auto row_of = [&](int n) { return me.tile(n) * kTileRows + me.row; };
  const auto load_c = [&](auto& c, const auto& from) {
#pragma unroll
    for (int n = 0; n < kCells; ++n) c[n] = load_cells<float>(from, row_of(n), unit);
  };
  // c as the step before `step` left it.
  const auto load_c_before = [&](auto& c, int step) {
    if (step == 0) return load_c(c, slice.state(op.c0));
    saved_c.move(-1);
    load_c(c, saved_c);
  };

  // Everything of the last step, and the gradients that come from after it.
  Vec<float, 2> c_now[kCells], c_before[kCells], arriving_c[kCells];
  Vec<float, 2> dh[kCells], dc[kCells];
  int length[kCells][2];
  if (me.has_cells) {
    ask();
    put();
    load_c(c_now, saved_c);
    load_c_before(c_before, last);
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      Vec<T, 2> dh_n = zeros<T, 2>();
      if (op.dh_n != nullptr) dh_n = load_cells<T>(slice.state(static_cast<const T*>(op.dh_n)), row_of(n), unit);
      dc[n] = zeros<float, 2>();
      if (op.dc_n != nullptr) dc[n] = load_cells<float>(slice.state(op.dc_n), row_of(n), unit);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        dh[n].set(r, dh_n[r]);
        length[n][r] = slice.length(row_of(n) + r, unit);
      }
    }
  }
  cluster_sync();

  for (int step = last; step >= 0; --step) {
    const int t = slice.time(step), turn = last - step;
    auto& dgates = shared->dgates[turn % 2];
    if (me.has_cells) {
      // Asked for now, needed in the next turn.
      if (step > 0) {
        saved_gates.move(-1);
        dy.move(-1);
        ask();
        load_c_before(arriving_c, step - 1);
      }

      // The lane's own cells.
#pragma unroll
      for (int n = 0; n < kCells; ++n) {
        const Stage<T>& stage = shared->stage[me.group][me.tile(n)];
        const GateVecs<T, 2> s = get_gates(stage.gates, me);
        Vec<T, 2> dy_own[1] = {zeros<T, 2>()};
        if (has_dy) get_cells(dy_own, stage.units, me);
        GateVecs<T, 2> extra = zero_gates<T, 2>();
        if (kExtras && op.d_gates != nullptr) {
          extra = {load_cells<T>(d_gates, row_of(n), unit, 0), load_cells<T>(d_gates, row_of(n), unit, 1),
                   load_cells<T>(d_gates, row_of(n), unit, 2), load_cells<T>(d_gates, row_of(n), unit, 3)};
        }
        if (kExtras && op.d_c != nullptr) {
          const Vec<float, 2> more = load_cells<float>(d_c, row_of(n), unit);
          for (int r = 0; r < 2; ++r) dc[n].element[r] += more.element[r];
        }
        GateVecs<T, 2> delta = zero_gates<T, 2>();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (t < length[n][r]) {
            const GatesBwd<float> d =
                lstm_step_bwd(s[r], c_before[n][r], tanh_(c_now[n][r]), dh[n][r] + dy_own[0][r], dc[n][r], extra[r]);
            delta.set(r, d.delta);
            dc[n].set(r, d.dc_prev);
          }
        }
        put_gates(&dgates[me.tile(n)][me.group * kTileCores<T>], Memory::kGateCores, delta, me);
        c_now[n] = c_before[n];
      }
    }
    // dgates are whole.
    __syncthreads();

    // The block's share of W^T dgates leaves as mma has made it: 16 bytes of a lane are two units of one owner in two rows.
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      Sums share[Memory::kResults];
      multiply_all<T, kPasses, Memory::kSteps>(share, weights, dgates[tile], me);
#pragma unroll
      for (int m = 0; m < Memory::kResults; ++m) {
        const int group = (me.warp * Memory::kResults + m) * 2 + me.index / 16, owner = group / Class::kGroups;
        const Sums* const to = &shared->dh[turn % 2][me.block][tile][group % Class::kGroups][me.index % 16];
        store_async(cluster_address(to, owner), share[m], cluster_address(&shared->ready[turn % 2], owner));
      }
    }
    if (!me.has_cells) continue;

    // d(gx) leaves, and what has been asked for takes its place, while the shares are on their way.
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      Pieces<T, kGates>::store(&dgates[me.tile(n)][me.group * kTileCores<T>], Memory::kGateCores, dgx, aligned,
                               me.tile(n) * kTileRows, me.first_unit, me);
      c_before[n] = arriving_c[n];
    }
    put();
    dgx.move(-1);
    d_gates.move(-1);
    d_c.move(-1);

    arrivals.wait(turn);
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
      float sum[2] = {};
#pragma unroll
      for (int sender = 0; sender < Class::kCluster; ++sender) {
        const Sums& share = shared->dh[turn % 2][sender][me.tile(n)][me.group][me.unit / 2 * 4 + me.row / 2];
        for (int r = 0; r < 2; ++r) sum[r] += share.element[me.unit % 2 * 2 + r];
      }
      for (int r = 0; r < 2; ++r) {
        if (t < length[n][r]) dh[n].set(r, sum[r]);
      }
    }
  }

  if (!me.has_cells) return;
#pragma unroll
  for (int n = 0; n < kCells; ++n) {
    Vec<T, 2> dh0;
    for (int r = 0; r < 2; ++r) dh0.set(r, dh[n][r]);
    store_cells(slice.state(static_cast<T*>(op.dh0)), row_of(n), unit, dh0);
    store_cells(slice.state(op.dc0), row_of(n), unit, dc[n]);
  }
}

// kAligned: known when compiled, else `aligned` says.
template <class T, class Class, int kTiles, bool kAligned, int kPasses>
__global__ void __launch_bounds__(Class::kThreads, 1) lstm_cluster_bwd_kernel(const LstmBwd op, const bool aligned) {
  if constexpr (kHasClusters) backward<T, Class, kTiles, kAligned, kPasses>(op, kAligned || aligned);
}

// Blocks that run at the same time, of the kernel that takes most shared memory.
template <class T>
int resident_bwd(int64_t hidden) {
  return with_class<T>(hidden, 0, [&]<class Class>() {
    constexpr bool kAligned = Class::kHasAligned;
    constexpr int kTiles = kAligned ? 2 : 1;
    return FB_RESIDENT_BLOCKS((lstm_cluster_bwd_kernel<T, Class, kTiles, kAligned, 1>), Placement{Class::kCluster},
                              dim3(Class::kThreads), (BackwardMemory<T, Class, kTiles, kAligned>::bytes()))
        .blocks;
  });
}

template <class T, int kPasses>
int run(const LstmBwd& op, void* stream) {
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  constexpr int kWidth = kVectorWidth<T>;
  const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.dy, kWidth) && are_aligned({op.gates, op.dgx});
  // One tile leaves registers for gradients that only second derivatives bring.
  const bool one_tile = op.d_gates != nullptr || op.d_c != nullptr;
  return dispatch<T>(op.shape, op.w_hh, aligned, one_tile, [&]<class Class, int kTiles, bool kAligned>(dim3 grid) {
    constexpr size_t kBytes = BackwardMemory<T, Class, kTiles, kAligned>::bytes();
    static_assert(kBytes <= kMostSharedBytes);
    return FB_LAUNCH_PLACED((lstm_cluster_bwd_kernel<T, Class, kTiles, kAligned, kPasses>), Placement{Class::kCluster}, grid,
                            dim3(Class::kThreads), kBytes, stream, op, aligned);
  });
}

}  // namespace fuseblock::lstm_cluster
