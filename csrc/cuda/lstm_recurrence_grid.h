// C interface of the recurrence's grid tier: the blocks of a cooperative launch form teams; a team keeps w_hh of a direction
// on chip, in registers and shared memory, and exchanges h through L2. sm_80 and newer. Tensors: lstm_recurrence.h.
#pragma once

#include "cuda/lstm_recurrence.h"

namespace fuseblock {

// What the kernels are compiled for, and the only lists of it: half of the tiles of weights (16 x 32 bytes) of a warp. Any H
// that some number of blocks can hold at so many runs: lstm_recurrence_grid_plan.h.
#define FB_LSTM_GRID_CLASSES(X) X(2) X(4) X(6) X(8) X(12) X(16) X(24) X(28) X(32)
#define FB_LSTM_GRID_FLOAT32_CLASSES(X) X(4) X(8) X(16) X(32)

}  // namespace fuseblock

// dtype: fuseblock::DType number of T. workspace: as large as launch/lstm_grid.py says, of any content.
// Blocks that cannot all run at the same time are an error, cudaErrorCooperativeLaunchTooLarge. Streams that are captured into a
// CUDA graph take the launch, too: cudaLaunchAttributeCooperative is valid for launches and for graph nodes.
extern "C" {
int launch_lstm_grid_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream);
int launch_lstm_grid_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream);
// Blocks that run at the same time on the current device, of the instance with most registers, whatever H: 0 where it has no
// cooperative launches. Shared memory is the plan's affair.
int lstm_grid_fwd_resident(int64_t hidden, int dtype);
int lstm_grid_bwd_resident(int64_t hidden, int dtype);
}
