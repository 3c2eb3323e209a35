// How a launch of the grid tier spreads over the multiprocessors, one block on each.
//
//   steps      S, the class: a warp keeps 2 S tiles of weights, 16 rows x 32 bytes; the first 32 (float32: 28) in registers
//   groups     G: a block owns the cells of G groups of 8 units, and its 8 warps hold 16 S tiles. So the forward pass, where they
//              are 32 G gate rows x padded H, and the backward pass, 128 columns x gate rows, hold
//                  padded H = 8 S k / G                     with k elements in 32 bytes: 16, or 8 of float32
//   teams      of blocks that hold one direction. Each takes jobs, (direction, slice of the batch), one after the other.
//   tiles      of 8 rows in a slice; G x tiles cell tiles have a warp each, so at most 8
//
// Few groups make many blocks with little work each; many groups leave multiprocessors for more teams, and less h is copied.
#pragma once

#include <algorithm>

#include "cuda/lstm_recurrence_grid.h"

namespace fuseblock::lstm_grid {

inline constexpr int kWarps = 8, kThreads = 32 * kWarps;
inline constexpr int kColumns = 16 * kWarps;   // units of h whose gradient a block sums over its gate rows
inline constexpr int kCounterBytes = 128;      // a line of L2
inline constexpr int kStageTiles = 5;          // cell tiles that each warp has for itself in shared memory

// Of a warp: 128 registers of each thread, or a few less where operands are split.
constexpr int tiles_in_registers(int element) { return element == 4 ? 28 : 32; }

struct Plan {
  int groups, steps, tiles;
  int rows, columns, blocks;  // of a team, which are rows x columns: of its groups, backward; forward has one row
  int teams, jobs;            // jobs: 0 where nothing fits
  int shared_bytes;           // of a block
  int operand_bytes;          // of a tile of rows: what a product takes, h or dgates of a row group
  int owned_bytes;            // of these the first, which blocks own and write; beyond them h is nothing but padding
  int64_t team_bytes;         // of the workspace: counters first, which are zero, then what is written before it is read
  int counter_bytes;
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Weights, operands and stages; forward also the sums of warps.
inline int shared_bytes(const Plan& x, int element, bool backward) {
  const int weights = std::max(0, 2 * x.steps - tiles_in_registers(element)) * kWarps * 512;
  const int sums = backward ? 0 : 1024 * kWarps;
  return weights + x.tiles * (x.operand_bytes + sums) + kWarps * kStageTiles * 64 * element;
}

// Counters, and what a step exchanges, twice: h, or dgates and partial sums.
inline int64_t team_bytes(const Plan& x, bool backward) {
  const int64_t partial_sums = backward ? int64_t{256} * x.blocks * x.groups * x.rows : 0;
  return x.counter_bytes + 2 * x.tiles * (int64_t{x.rows} * x.operand_bytes + partial_sums);
}

// Clocks of a step, roughly: for waiting, and for each tile of rows for mma and for copying its operand from L2. Unmeasured;
// only the choice between plans depends on it.
inline double clocks(const Plan& x) { return 2000 + x.tiles * x.steps * (52 + 85. / x.groups); }

// The plan that needs the least time; jobs == 0 if none fits. element: bytes of T.
inline Plan plan_of(const LstmShape& shape, int element, bool backward) {
  Plan best{};
  double least = 0;
  const int k = 32 / element;
  for (const int groups : {1, 2, 4, 8}) {
    const int64_t wanted = ceil_div(shape.hidden, kColumns) * groups * 16 / k;
    int steps = 0;
    const auto offer = [&](int s) {
      if (steps == 0 && s >= wanted && s * k % (16 * groups) == 0) steps = s;
    };
#define FB_LSTM_GRID_CLASS(S) offer(S);
    if (element == 4) {
      FB_LSTM_GRID_FLOAT32_CLASSES(FB_LSTM_GRID_CLASS)
    } else {
      FB_LSTM_GRID_CLASSES(FB_LSTM_GRID_CLASS)
    }
#undef FB_LSTM_GRID_CLASS
    if (steps == 0) continue;
    const int columns = steps * k / (16 * groups);
    const int64_t blocks = backward ? columns * ceil_div(shape.hidden, columns * groups * 8) : ceil_div(shape.hidden, groups * 8);
    if (blocks > shape.multiprocessors) continue;
    for (int tiles = 1; tiles * groups <= kWarps; ++tiles) {
      const int64_t jobs = ceil_div(shape.batch, tiles * 8) * shape.directions;
      Plan x{.groups = groups, .steps = steps, .tiles = tiles};
      x.columns = backward ? columns : static_cast<int>(blocks);
      x.rows = static_cast<int>(blocks) / x.columns;
      x.blocks = static_cast<int>(blocks);
      x.teams = static_cast<int>(std::min(shape.multiprocessors / blocks, jobs));
      x.operand_bytes = backward ? 512 * steps : 2048 * steps / groups;
      x.owned_bytes = backward ? x.operand_bytes : x.blocks * groups * 64 * element;
      x.counter_bytes = kCounterBytes * (backward ? x.rows + 2 * x.columns : 1);
      x.shared_bytes = shared_bytes(x, element, backward);
      x.team_bytes = team_bytes(x, backward);
      if (x.shared_bytes > shape.shared_bytes || jobs > INT32_MAX) continue;
      x.jobs = static_cast<int>(jobs);
      const double all = clocks(x) * static_cast<double>(ceil_div(jobs, x.teams));
      if (best.jobs == 0 || all < least) {
        best = x;
        least = all;
      }
    }
  }
  return best;
}

}  // namespace fuseblock::lstm_grid
