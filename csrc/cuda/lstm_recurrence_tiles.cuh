// What the tiers with several blocks are made of: operands of mma in shared memory, resident weights, a warp's cells.
//
//   core matrix    8 rows of the batch x 16 bytes of k, 128 contiguous bytes. A right operand (h, or dgates) is a sequence of
//                  them along k: no padding, no bank conflicts, and the part that a block makes is contiguous
//   operand step   32 bytes of k: one mma (lstm_recurrence_operands.cuh), two core matrices
//   cell tile      8 units x 8 rows of the batch, of one warp. A lane owns one unit in two neighbouring rows
//
// Tensors arrive and leave in pieces of 16 bytes, a lane each, which the owners of cells take from core matrices and put there.
#pragma once

#include "cuda/lstm_gates.cuh"
#include "cuda/lstm_recurrence_operands.cuh"
#include "cuda/lstm_recurrence_views.cuh"
#include "cuda/named_barrier.h"

namespace fuseblock::lstm_recurrence {

inline constexpr int kTileUnits = 8;

template <class T>
struct Core {
  Vec<T, kVectorWidth<T>> row[kTileRows];
};

template <class T>
inline constexpr int kTileCores = kTileUnits / kVectorWidth<T>;  // core matrices of a cell tile

template <class T>
FB_HD Vec<T, 2> pair(T x, T y) {
  Vec<T, 2> both;
  both.element[0] = x;
  both.element[1] = y;
  return both;
}

// A cell tile's room in shared memory for tensors that pass through: its gates, on their way in and out, and one value more.
template <class T>
struct Stage {
  Core<T> gates[kGates * kTileCores<T>], units[kTileCores<T>];
};

// What a lane owns of its warp's cell tile: what mma leaves in c[0], c[1] and in c[2], c[3].
struct Lane {
  int index = threadIdx.x % 32;
  int unit = index / 4;
  int row = index % 4 * 2;  // and the next one
};

// Pieces of rows; where a tensor is not `aligned`, element by element: a branch, since it costs less than other kernels.
template <class T>
__device__ __forceinline__ Vec<T, kVectorWidth<T>> load_piece(const Window<const T, true>& from, bool aligned, int row, int unit,
                                                              int gate = 0) {
  if (aligned) return from.template load<kVectorWidth<T>>(row, unit, gate);
  Vec<T, kVectorWidth<T>> x;
#pragma unroll
  for (int n = 0; n < kVectorWidth<T>; ++n) x.element[n] = from.template load<1>(row, unit + n, gate).element[0];
  return x;
}

template <class T>
__device__ __forceinline__ void store_piece(const Window<T, true>& to, bool aligned, int row, int unit,
                                            const Vec<T, kVectorWidth<T>>& x, int gate = 0) {
  if (aligned) return to.store(row, unit, x, gate);
#pragma unroll
  for (int n = 0; n < kVectorWidth<T>; ++n) to.store(row, unit + n, Vec<T, 1>{x.element[n]}, gate);
}

// The pieces of a cell tile, of one tensor of units (kParts = 1) or of its gates (4). Piece p of it is row p % 8 of core
// matrix p / 8, and lane p % 32 moves it.
template <class T, int kParts>
struct Pieces {
  static constexpr int kAll = kParts * kTileCores<T> * kTileRows, kCount = (kAll + 31) / 32;
  static constexpr int kWidth = kVectorWidth<T>;
  Vec<T, kWidth> piece[kCount];

  // f(n, core, row, unit within the tile, gate) for each piece n of this lane.
  template <class F>
  static __device__ __forceinline__ void each(const Lane& me, F f) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int index = n * 32 + me.index, core = index / kTileRows;
      if (index < kAll) f(n, core, index % kTileRows, core % kTileCores<T> * kWidth, core / kTileCores<T>);
    }
  }
  __device__ __forceinline__ void load(const Window<const T, true>& from, bool aligned, int first_row, int first_unit,
                                       const Lane& me) {
    each(me, [&](int n, int, int row, int unit, int gate) {
      piece[n] = load_piece(from, aligned, first_row + row, first_unit + unit, gate);
    });
  }
  __device__ __forceinline__ void put(Core<T>* to, const Lane& me) const {
    each(me, [&](int n, int core, int row, int, int) { to[core].row[row] = piece[n]; });
  }
  // `stride`: core matrices from one gate to the next.
  static __device__ __forceinline__ void store(const Core<T>* from, int stride, const Window<T, true>& to, bool aligned,
                                               int first_row, int first_unit, const Lane& me) {
    each(me, [&](int, int core, int row, int unit, int gate) {
      const Core<T>& at = from[gate * stride + core % kTileCores<T>];
      store_piece(to, aligned, first_row + row, first_unit + unit, at.row[row], gate);
    });
  }
};

// Cells of the owners into the core matrices of their tile. All lanes of the warp; __syncwarp before others read.
template <class T>
__device__ __forceinline__ void put_cells(Core<T>* to, const Vec<T, 2>& rows, const Lane& me) {
  if constexpr (sizeof(T) == 2) {
    reinterpret_cast<uint32_t*>(to)[me.index] = movmatrix_transposed(bits(rows));
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to[me.unit / kVectorWidth<T>].row[me.row + r].element[me.unit % kVectorWidth<T>] = rows.element[r];
    }
  }
}

// And back: kParts tiles one after the other.
template <int kParts, class T>
__device__ __forceinline__ void get_cells(Vec<T, 2> (&rows)[kParts], const Core<T>* from, const Lane& me) {
  if constexpr (sizeof(T) == 2) {
    uint32_t r[kParts];
    ldmatrix_transposed<kParts>(r, &from[me.index / kTileRows % kParts].row[me.index % kTileRows]);
#pragma unroll
    for (int n = 0; n < kParts; ++n) rows[n] = *reinterpret_cast<const Vec<T, 2>*>(&r[n]);
  } else {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const Core<T>& core = from[n * kTileCores<T> + me.unit / kVectorWidth<T>];
      const int column = me.unit % kVectorWidth<T>;
      rows[n] = pair(core.row[me.row].element[column], core.row[me.row + 1].element[column]);
    }
  }
}

template <class T>
__device__ __forceinline__ GateVecs<T, 2> get_gates(const Core<T>* from, const Lane& me) {
  Vec<T, 2> gate[kGates];
  get_cells<kGates>(gate, from, me);
  return {gate[0], gate[1], gate[2], gate[3]};
}

// `stride`: core matrices from one gate to the next.
template <class T>
__device__ __forceinline__ void put_gates(Core<T>* to, int stride, const GateVecs<T, 2>& x, const Lane& me) {
  put_cells(to, x.i, me);
  put_cells(to + stride, x.f, me);
  put_cells(to + 2 * stride, x.g, me);
  put_cells(to + 3 * stride, x.o, me);
}

// Two rows of one unit, element by element: for float32 states, of which a warp takes whole sectors of 32 bytes.
template <class T>
__device__ __forceinline__ Vec<T, 2> load_cells(const Window<const T, true>& from, int row, int unit, int gate = 0) {
  return pair(from.template load<1>(row, unit, gate).element[0], from.template load<1>(row + 1, unit, gate).element[0]);
}
template <class T>
__device__ __forceinline__ void store_cells(const Window<T, true>& to, int row, int unit, const Vec<T, 2>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) to.store(row + r, unit, Vec<T, 1>{x.element[r]});
}

// A tile of the left operand, 16 rows x 32 bytes of k, is four registers of every lane.
struct alignas(16) WeightTile {
  uint32_t part[4];
};

// Forward: the tile `half` (0: gates i and f, 1: g and o) of 8 units. Rows 0 to 7 are the first gate, 8 to 15 the second, so that
// mma leaves c[0], c[1] (first gate) and c[2], c[3] (second) of the lane's own cells.
template <class T, int kPasses, class Slice>
__device__ __forceinline__ WeightTile forward_tile(const T* w_hh, const Slice& slice, int half, int first_unit, int k,
                                                   const Lane& me) {
  WeightTile tile;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int column = k + me.index % 4 * kWord<T> + n / 2 * kVectorWidth<T>;
    const auto w = slice.weights(w_hh, 2 * half + n % 2);
    tile.part[n] = weight<T, kPasses>(w.template load<kWord<T>>(first_unit + me.unit, column));
  }
  return tile;
}

// Backward: 16 units of the result from `result` on (rows m and m + 8 are units 2m and 2m + 1) by an operand step from k on,
// which counts gate rows: `count` units, even, from `first_unit` on of gate i, then of f, g, o.
template <class T, int kPasses, class Slice>
__device__ __forceinline__ WeightTile backward_tile(const T* w_hh, const Slice& slice, int result, int first_unit, int count,
                                                    int k, const Lane& me) {
  WeightTile tile;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int gate_row = k + me.index % 4 * kWord<T> + half * kVectorWidth<T>;
    const int row = first_unit + gate_row % count, column = result + 2 * me.unit;
    const auto w = slice.weights(w_hh, gate_row / count);
    const Vec<T, 2> x = w.template load<2>(row, column);
    if constexpr (sizeof(T) == 2) {
      const Vec<T, 2> next = w.template load<2>(row + 1, column);
      tile.part[2 * half] = bits(pair(x.element[0], next.element[0]));
      tile.part[2 * half + 1] = bits(pair(x.element[1], next.element[1]));
    } else {
      tile.part[2 * half] = weight<T, kPasses>({x.element[0]});
      tile.part[2 * half + 1] = weight<T, kPasses>({x.element[1]});
    }
  }
  return tile;
}

// A warp's tiles in the order of their use: the first kRegisters of them in registers, the others in shared memory, where a
// lane reads its own 16 bytes.
template <int kCount, int kRegisters>
struct ResidentTiles {
  static constexpr int kHeld = std::min(kCount, kRegisters), kBytes = (kCount - kHeld) * 32 * 16;  // of shared memory
  WeightTile held[kHeld];
  const WeightTile* shared;  // the lane's own part of the first tile there

  // tile(n) loads one; `room`: kBytes.
  template <class F>
  __device__ __forceinline__ void load(void* room, const Lane& me, F tile) {
    WeightTile* const rest = static_cast<WeightTile*>(room) + me.index;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      if (n % 8 == 0) __syncwarp();  // some at a time, or addresses take the registers of weights
      held[n] = tile(n);
    }
#pragma unroll 1
    for (int n = kHeld; n < kCount; ++n) rest[(n - kHeld) * 32] = tile(n);
    shared = rest;
  }

  // n: a constant, when all loops are unrolled.
  __device__ __forceinline__ WeightTile get(int n) const { return n < kHeld ? held[n] : shared[(n - kHeld) * 32]; }
};

// Sums of mma: of the lane's two rows in one unit (of one gate), then in another.
using Sums = Vec<float, 4>;

// sum[tile][m] = the warp's kRows tiles of 16 rows times each tile of the batch, over kSteps operand steps from core matrix b[0]
// on; `stride`: core matrices from one tile of the batch to the next. The weights' tile of rows m and step k is number
// k * kRows + m. At least four chains of mma are on their way at a time, where there are as many tiles or steps. They are summed
// every kPiece steps: short chains round less.
template <class T, int kPasses, int kSteps, int kPiece = kSteps, int kTiles, int kRows, class Tiles>
__device__ __forceinline__ void multiply_all(Sums (&sum)[kTiles][kRows], const Tiles& weights, const Core<T>* b, int stride,
                                             const Lane& me) {
  static_assert(kPiece % 2 == 0 && kSteps % kPiece == 0);
  constexpr int kChains = kTiles * kRows < 4 ? 2 : 1;
#pragma unroll
  for (int first = 0; first < kSteps; first += kPiece) {
    Sum<kPasses> chain[kTiles][kRows][kChains];
#pragma unroll
    for (int k = first; k < first + kPiece; k += 2) {
      RightOperand<T, kPasses> operands[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t r[4];
        ldmatrix<4>(r, &b[tile * stride + 2 * k + me.index / kTileRows].row[me.index % kTileRows]);
        operands[tile][0] = right_operand<T, kPasses>(r[0], r[1]);
        operands[tile][1] = right_operand<T, kPasses>(r[2], r[3]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          // Or the loads of all weights in shared memory begin at once, and take the registers of the others.
          if (m % 2 == 0 && (k + n) * kRows + m + 1 >= Tiles::kHeld) __syncwarp();
          const WeightTile weight = weights.get((k + n) * kRows + m);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply<T, kPasses>(chain[tile][m][n % kChains], weight.part, operands[tile][n]);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float piece = chain[tile][m][0][n] + (kChains == 1 ? 0 : chain[tile][m][kChains - 1][n]);
          sum[tile][m].element[n] = first == 0 ? piece : sum[tile][m].element[n] + piece;
        }
      }
    }
  }
}

// The same for one tile of the batch.
template <class T, int kPasses, int kSteps, int kRows, class Tiles>
__device__ __forceinline__ void multiply_all(Sums (&sum)[kRows], const Tiles& weights, const Core<T>* b, const Lane& me) {
  Sums of_tile[1][kRows];
  multiply_all<T, kPasses, kSteps>(of_tile, weights, b, 0, me);
#pragma unroll
  for (int m = 0; m < kRows; ++m) sum[m] = of_tile[0][m];
}

// Forward, where kParts warps have each multiplied a part of k for the same units: their sums, in a fixed order. Part p owns
// the cells of row tiles p, p + kParts, ...: `own`, which other parts leave as it is. `room`: [kTiles][kParts] of shared memory.
// The next call must not come before all parts have done with this one.
template <int kParts, int kTiles, int kCells>
__device__ __forceinline__ void add_parts(Sums (&own)[kCells][2], const Sums (&sum)[kTiles][2], Sums (*room)[kParts][2][32],
                                          int part, unsigned barrier, const Lane& me) {
  static_assert(kCells == (kTiles + kParts - 1) / kParts);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (part == tile % kParts) {
        own[tile / kParts][half] = sum[tile][half];
      } else {
        room[tile][part][half][me.index] = sum[tile][half];
      }
    }
  }
  if constexpr (kParts > 1) {
    if (part >= kTiles) return named_barrier_arrive(barrier, kParts * 32);
    named_barrier_sync(barrier, kParts * 32);
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const int tile = cell * kParts + part;
#pragma unroll
      for (int other = 0; other < kParts; ++other) {
        if (other == part || tile >= kTiles) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Sums theirs = room[tile][other][half][me.index];
#pragma unroll
          for (int n = 0; n < 4; ++n) own[cell][half].element[n] += theirs.element[n];
        }
      }
    }
  }
}

// The four gates' sums of the lane's cell in row r, 0 or 1.
FB_HD Gates<float> gates_of(const Sums (&sum)[2], int r) {
  return {sum[0].element[r], sum[0].element[2 + r], sum[1].element[r], sum[1].element[2 + r]};
}

}  // namespace fuseblock::lstm_recurrence
