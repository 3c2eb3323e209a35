// What both kernels of the block tier are made of: who owns what, tiles of shared memory.
//
//   H       padded hidden size, a template constant: one of FB_LSTM_BLOCK_CLASSES
//   tiles   batch rows of a block in units of 8, the N of mma m16n8k16: 1 or 2
//
// A block has a warp for every 16 units. The product is written with the weights as its left operand and the batch as its
// columns, so that weights stay where they are (in registers) and small batches waste little.
#pragma once

#include "cuda/lstm_gates.cuh"
#include "cuda/lstm_recurrence_block.h"
#include "cuda/lstm_recurrence_views.cuh"
#include "cuda/mma.h"

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
  int column = lane % 4 * 2;                  // of its own in each operand of mma, and two more 8 further on
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

template <class T>
FB_HD uint32_t bits(const Vec<T, 2>& x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}

template <class T>
FB_HD Vec<T, 2> pair(T x, T y) {
  Vec<T, 2> both;
  both.element[0] = x;
  both.element[1] = y;
  return both;
}

// The right operands of two mma, k to k + 15 and k + 16 to k + 31, for the rows of one tile. The operand's columns are rows in
// shared memory, as ldmatrix wants it.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void load_operands(uint32_t (&b)[2][2], SharedRows<T, kRows, kColumns>& from, int tile, int k,
                                              const Thread& me) {
  uint32_t r[4];
  ldmatrix<4>(r, &from.template at<8>(tile * kTileRows + me.lane % 8, k + me.lane / 8 * 8));
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

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
  static constexpr int kCount = kTiles * kGates / 2;
  using Shared = SharedRows<T, kTiles * kTileRows, kGates * H>;

  Vec<T, kWidth> piece[kCount];

  template <class F>
  static FB_HD void each(const Thread& me, F f) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int row = n / 2 * kTileRows + me.lane % kTileRows, gate = n % 2 * 2 + me.lane / 16;
      f(n, row, me.first + me.lane / kTileRows % 2 * kWidth, gate);
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

// Calls launch.operator()<T, H, tiles, aligned>(grid) for the kernel that fits; cudaSuccess where there is nothing to do.
// Two tiles of rows share the weights of a block, but not its time: they pay where there are not enough multiprocessors for
// one each. `one_tile`: never two.
template <class Launch>
cudaError_t dispatch(const LstmShape& shape, int dtype, const void* w_hh, bool aligned, bool one_tile, Launch launch) {
  const bool valid = shape.steps > 0 && shape.steps <= INT32_MAX && shape.batch >= 0 && shape.hidden >= 0 &&
                     shape.hidden <= kLstmBlockLargestHidden && (shape.directions == 1 || shape.directions == 2);
  if (!valid || !are_aligned({w_hh}) || (dtype != kFloat16 && dtype != kBFloat16)) return cudaErrorInvalidValue;
  if (shape.batch == 0 || shape.hidden == 0) return cudaSuccess;
  const int64_t tiles = (shape.batch + kTileRows - 1) / kTileRows;
  const bool two = aligned && !one_tile && tiles * shape.directions > shape.multiprocessors;
  const int64_t blocks = two ? (tiles + 1) / 2 : tiles;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shape.directions));
  const auto launch_class = [&]<class T, int H>() {
    if (two) return launch.template operator()<T, H, 2, true>(grid);
    return aligned ? launch.template operator()<T, H, 1, true>(grid) : launch.template operator()<T, H, 1, false>(grid);
  };
#define FB_LSTM_BLOCK_CASE(H)                                                                     \
  if (shape.hidden <= H) {                                                                        \
    return dtype == kFloat16 ? launch_class.template operator()<__half, H>()                      \
                             : launch_class.template operator()<__nv_bfloat16, H>();              \
  }
  FB_LSTM_BLOCK_CLASSES(FB_LSTM_BLOCK_CASE)
#undef FB_LSTM_BLOCK_CASE
  return cudaErrorInvalidValue;
}

}  // namespace fuseblock::lstm_block
