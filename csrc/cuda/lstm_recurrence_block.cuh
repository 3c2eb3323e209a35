// What both kernels of the block tier are made of: who owns what, tiles of shared memory.
//
//   H       padded hidden size, a template constant: one of FB_LSTM_BLOCK_CLASSES
//   tiles   batch rows of a block in units of 8, the N of mma: 1 or 2
//   passes  of mma over the operands: lstm_recurrence_operands.cuh
//
// A block has a warp for every 16 units. The product is written with the weights as its left operand and the batch as its
// columns, so that weights stay where they are (in registers; in float32 above H = 64 some of them in shared memory) and small
// batches waste little.
#pragma once

#include "cuda/lstm_gates.cuh"
#include "cuda/lstm_recurrence_block.h"
#include "cuda/lstm_recurrence_tiles.cuh"

namespace fuseblock::lstm_block {

using namespace lstm_recurrence;

inline constexpr int kWarpUnits = 16;

// Where a thread stands. It owns two neighbouring units and, of every tile, two neighbouring rows: the four numbers that mma
// leaves in its accumulator, when row m of a weight tile is unit 2m (m < 8) or 2(m - 8) + 1. So
//
//   accumulator[2 * u + r]  is  (unit + u, row + r)
struct Thread {
  int lane = threadIdx.x % 32;
  int first = threadIdx.x / 32 * kWarpUnits;  // of its warp's units
  int unit = first + lane / 4 * 2;            // of its own
  int row = lane % 4 * 2;                     // of its own, in each tile
  int word = lane % 4;                        // of its own in each operand of mma, and one more 4 further on
};

// `rows` rows of `columns` elements in shared memory. A row is 16 bytes longer than its content (a multiple of 64 bytes), so
// that neither the lanes that read a column of an operand, nor those that exchange 16-byte pieces, nor the owners of
// neighbouring units meet in a bank.
template <class T, int kRows, int kColumns>
struct SharedRows {
  static constexpr int kPieces = kColumns / kVectorWidth<T> + 1;
  Vec<T, kVectorWidth<T>> pieces[kRows][kPieces];

  template <int N>
  FB_HD Vec<T, N>& at(int row, int column) {
    return *reinterpret_cast<Vec<T, N>*>(&pieces[row][0].element[0] + column);
  }
};

// The right operands of two mma, for the rows of one tile and k from `column` on. The operand's columns are rows in shared
// memory, as ldmatrix wants it.
template <int kPasses, class T, int kRows, int kColumns>
__device__ __forceinline__ void load_operands(RightOperand<T, kPasses> (&x)[2], SharedRows<T, kRows, kColumns>& from, int tile,
                                              int column, const Thread& me) {
  constexpr int kWidth = kVectorWidth<T>;
  uint32_t r[4];
  ldmatrix<4>(r, &from.template at<kWidth>(tile * kTileRows + me.lane % 8, column + me.lane / 8 * kWidth));
  x[0] = right_operand<T, kPasses>(r[0], r[1]);
  x[1] = right_operand<T, kPasses>(r[2], r[3]);
}

// A warp's tiles of weights (16 units by one step of k): tile k * kGates + gate. In registers as many as there is room for.
template <class T, int H>
inline constexpr int kHeldTiles = !std::is_same_v<T, float> || H <= 64 ? 32 : H <= 96 ? 26 : 33;
template <class T, int H>
using Weights = ResidentTiles<kGates * H / kStep<T>, kHeldTiles<T, H>>;

// Dynamic shared memory of a block, for the others.
template <class T, int H>
inline constexpr int kWeightBytes = Weights<T, H>::kBytes * H / kWarpUnits;

template <int H>
inline constexpr int kMostSharedBytes = H <= 96 ? kLstmBlockSharedBytes : kLstmBlockSharedBytesAbove96;

// What a warp moves between global and shared memory: 16-byte pieces of its 16 units of each row, in the dtype T.
// kParts pieces of T make up 16 units: 2 in 16 bit, 4 in float32. Neighbouring lanes take neighbouring rows.
template <class T>
inline constexpr int kParts = kWarpUnits / kVectorWidth<T>;

template <class T, int kTiles>
struct UnitPieces {
  static constexpr int kLanes = kTileRows * kParts<T>;  // that a tile keeps busy
  static constexpr int kWidth = kVectorWidth<T>;
  static constexpr int kCount = (kTiles * kLanes + 31) / 32;  // pieces of a lane

  Vec<T, kWidth> piece[kCount];

  // f(piece, row, unit) for each piece of this lane.
  template <class F>
  static FB_HD void each(const Thread& me, F f) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int index = n * 32 + me.lane, tile = index / kLanes;
      const int row = tile * kTileRows + index % kTileRows;
      const int unit = me.first + index % kLanes / kTileRows * kWidth;
      if (tile < kTiles) f(n, row, unit);
    }
  }

  template <class W>
  FB_HD void load(const W& from, const Thread& me) {
    each(me, [&](int n, int row, int unit) { piece[n] = from.template load<kWidth>(row, unit); });
  }

  template <int kRows, int kColumns>
  FB_HD void put(SharedRows<T, kRows, kColumns>& into, const Thread& me) const {
    each(me, [&](int n, int row, int unit) { into.template at<kWidth>(row, unit) = piece[n]; });
  }

  template <int kRows, int kColumns, class W>
  static FB_HD void store(SharedRows<T, kRows, kColumns>& from, const W& into, const Thread& me) {
    each(me, [&](int, int row, int unit) { into.store(row, unit, from.template at<kWidth>(row, unit)); });
  }
};

// The same for the four gates: in shared memory gate g of unit j is in column g * H + j.
template <class T, int H, int kTiles>
struct GatePieces {
  static constexpr int kWidth = kVectorWidth<T>;
  static constexpr int kPerTile = kGates * kParts<T> / 4, kCount = kTiles * kPerTile;  // pieces of a lane
  using Shared = SharedRows<T, kTiles * kTileRows, kGates * H>;

  Vec<T, kWidth> piece[kCount];

  template <class F>
  static FB_HD void each(const Thread& me, F f) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = n / kPerTile * kTileRows + me.lane % kTileRows, part = me.lane / kTileRows;
      const int gate = n % kPerTile * 4 / kParts<T> + part / kParts<T>;
      f(n, row, me.first + part % kParts<T> * kWidth, gate);
    }
  }

  template <class W>
  FB_HD void load(const W& from, const Thread& me) {
    each(me, [&](int n, int row, int unit, int gate) { piece[n] = from.template load<kWidth>(row, unit, gate); });
  }

  FB_HD void put(Shared& into, const Thread& me) const {
    each(me, [&](int n, int row, int unit, int gate) { into.template at<kWidth>(row, gate * H + unit) = piece[n]; });
  }

  template <class W>
  static FB_HD void store(Shared& from, const W& into, const Thread& me) {
    each(me, [&](int, int row, int unit, int gate) {
      into.store(row, unit, from.template at<kWidth>(row, gate * H + unit), gate);
    });
  }
};

// A thread's own two units of the four gates in one row of shared memory.
template <class T, int H, int kRows>
FB_HD GateVecs<T, 2> own_gates(SharedRows<T, kRows, kGates * H>& from, int row, int unit) {
  return {from.template at<2>(row, unit), from.template at<2>(row, H + unit), from.template at<2>(row, 2 * H + unit),
          from.template at<2>(row, 3 * H + unit)};
}

template <class T, int H, int kRows>
FB_HD void put_own_gates(SharedRows<T, kRows, kGates * H>& into, int row, int unit, const GateVecs<T, 2>& x) {
  into.template at<2>(row, unit) = x.i;
  into.template at<2>(row, H + unit) = x.f;
  into.template at<2>(row, 2 * H + unit) = x.g;
  into.template at<2>(row, 3 * H + unit) = x.o;
}

// Calls launch.operator()<H, tiles, aligned>(grid) for the kernel that fits; cudaSuccess where there is nothing to do.
// Two tiles of rows share the weights of a block, but not its time: they pay where there are not enough multiprocessors for
// one each. `one_tile`: never two, as in float32.
template <class T, class Launch>
cudaError_t dispatch(const LstmShape& shape, const void* w_hh, bool aligned, bool one_tile, Launch launch) {
  constexpr bool kFloat32 = std::is_same_v<T, float>;
  const bool valid = shape.steps > 0 && shape.steps <= INT32_MAX && shape.batch >= 0 && shape.hidden >= 0 &&
                     (shape.directions == 1 || shape.directions == 2);
  if (!valid || !are_aligned({w_hh})) return cudaErrorInvalidValue;
  if (shape.batch == 0 || shape.hidden == 0) return cudaSuccess;
  const int64_t tiles = (shape.batch + kTileRows - 1) / kTileRows;
  const bool two = !kFloat32 && aligned && !one_tile && tiles * shape.directions > shape.multiprocessors;
  const int64_t blocks = two ? (tiles + 1) / 2 : tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shape.directions));
  const auto launch_class = [&]<int H>() {
    if constexpr (!kFloat32) {
      if (two) return launch.template operator()<H, 2, true>(grid);
    }
    return aligned ? launch.template operator()<H, 1, true>(grid) : launch.template operator()<H, 1, false>(grid);
  };
#define FB_LSTM_BLOCK_CASE(H) \
  if (shape.hidden <= H) return launch_class.template operator()<H>();
  FB_LSTM_BLOCK_CLASSES(FB_LSTM_BLOCK_CASE)
#undef FB_LSTM_BLOCK_CASE
  return cudaErrorInvalidValue;
}

// The launchers' parts in float32, in translation units of their own: they take as long to compile as the others.
cudaError_t run_float32(const LstmFwd& op, void* stream);
cudaError_t run_float32(const LstmBwd& op, void* stream);

}  // namespace fuseblock::lstm_block
