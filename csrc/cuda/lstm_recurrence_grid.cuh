// What both kernels of the grid tier are made of: who owns what, shared memory, ways through L2.
//
//   passes   of mma over the operands: lstm_recurrence_operands.cuh
//   S        the class: half of a warp's tiles of weights; all other sizes are run-time values of the Plan
//
// h and d(gates) are sequences of core matrices (lstm_recurrence_tiles.cuh) in L2 as in shared memory, tile of rows after tile
// of rows: each block stores its part, and copies what the product needs as it lies.
#pragma once

#include "cuda/async_copy.h"
#include "cuda/grid_barrier.h"
#include "cuda/lstm_recurrence_grid_plan.h"
#include "cuda/lstm_recurrence_tiles.cuh"

namespace fuseblock::lstm_grid {

using namespace lstm_recurrence;

// Where a thread stands. The first groups x tiles warps own the cells of a group of 8 units in a tile of 8 rows.
struct Place {
  Lane lane;
  int warp = threadIdx.x / 32;
  int team, member;  // the block, among those of its team
  int group, tile;
  bool owns_cells;
  int first_unit, first_row;  // of the warp
  int unit, row;              // of the lane

  __device__ explicit Place(const Plan& plan) {
    team = blockIdx.x / plan.blocks;
    member = blockIdx.x % plan.blocks;
    group = warp % plan.groups;
    tile = warp / plan.groups;
    owns_cells = tile < plan.tiles;
    first_unit = (member * plan.groups + group) * kTileUnits;
    first_row = tile * kTileRows;
    unit = first_unit + lane.unit;
    row = first_row + lane.row;
  }
};

static_assert(sizeof(Stage<float>) == kStageTiles * kTileUnits * kTileRows * sizeof(float));  // as the plan has it

template <class T, int S>
using Weights = ResidentTiles<2 * S, tiles_in_registers(sizeof(T))>;

// Some rows of the batch in one direction.
struct Job {
  int direction;
  int64_t first_row;
  int most_rows;

  __device__ Job(int number, const LstmShape& shape, const Plan& plan) : most_rows(plan.tiles * kTileRows) {
    direction = number % static_cast<int>(shape.directions);
    first_row = number / shape.directions * most_rows;
  }
};

// A counter of blocks.
struct Counter {
  GridBarrier barrier;
  unsigned char others_keep_away[kCounterBytes - sizeof(GridBarrier)];
};

// What blocks give each other in a step, in turns of two places: buffer n % 2 for the n-th step of the team.
struct Ring {
  unsigned char* data;
  int64_t bytes;  // of one step

  __device__ unsigned char* step(unsigned n) const { return data + n % 2 * bytes; }
};

// The whole block copies the operand, which others have stored, after it has waited for them. cp.async of 16 bytes reads L2, past
// the multiprocessor's own cache; it is issued behind the barrier that follows the acquiring load, so it finds what was released.
__device__ __forceinline__ void gather(void* shared, const unsigned char* global, const Plan& plan) {
  const bool all = plan.owned_bytes == plan.operand_bytes;
  for (int at = threadIdx.x * 16; at < plan.tiles * plan.operand_bytes; at += kThreads * 16) {
    if (!all && at % plan.operand_bytes >= plan.owned_bytes) continue;
    copy_async<16>(static_cast<unsigned char*>(shared) + at, global + at);
  }
  copy_async_wait_all();
  __syncthreads();
}

// The pieces of a warp's stage to where `gather` finds them.
template <int kParts, class T>
__device__ __forceinline__ void publish(unsigned char* global, const Core<T>* stage, const Lane& me) {
  Pieces<T, kParts>::each(me, [&](int, int core, int row, int, int) {
    store_l2(&reinterpret_cast<Core<T>*>(global)[core].row[row], stage[core].row[row]);
  });
}

// Calls launch.operator()<S>(plan) for this call's plan; cudaSuccess where there is nothing to do.
template <class T, class Op, class Launch>
cudaError_t dispatch(const Op& op, bool backward, void* stream, Launch launch) {
  const LstmShape& shape = op.shape;
  const bool valid = shape.steps > 0 && shape.steps <= INT32_MAX && shape.batch >= 0 && shape.hidden >= 0 &&
                     shape.hidden <= INT32_MAX && (shape.directions == 1 || shape.directions == 2);
  if (!valid || !are_aligned({op.w_hh, op.workspace})) return cudaErrorInvalidValue;
  if (shape.batch == 0 || shape.hidden == 0) return cudaSuccess;
  const Plan plan = plan_of(shape, sizeof(T), backward);
  if (plan.jobs == 0) return cudaErrorCooperativeLaunchTooLarge;
  if (plan.teams * plan.team_bytes > op.workspace_bytes) return cudaErrorInvalidValue;
  // Launches must find the counters zero; none is left with what another one counted.
  const cudaError_t error = cudaMemset2DAsync(op.workspace, plan.team_bytes, 0, plan.counter_bytes, plan.teams,
                                              static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
#define FB_LSTM_GRID_CASE(S) \
  if (plan.steps == S) return launch.template operator()<S>(plan);
  if constexpr (std::is_same_v<T, float>) {
    FB_LSTM_GRID_FLOAT32_CLASSES(FB_LSTM_GRID_CASE)
  } else {
    FB_LSTM_GRID_CLASSES(FB_LSTM_GRID_CASE)
  }
#undef FB_LSTM_GRID_CASE
  return cudaErrorInvalidValue;
}

// The float32 instances are in files of their own.
cudaError_t run_float32(const LstmFwd& op, void* stream);
cudaError_t run_float32(const LstmBwd& op, void* stream);

}  // namespace fuseblock::lstm_grid
