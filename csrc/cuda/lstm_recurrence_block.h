// C interface of the recurrence's block tier: one block keeps w_hh of its direction on chip; blocks share nothing but inputs.
// Small H. Tensors: lstm_recurrence.h.
#pragma once

#include "cuda/lstm_recurrence.h"

namespace fuseblock {

// The sizes that the kernels are compiled for, and the only list of them. Smaller H is padded with zero units up to the next.
#define FB_LSTM_BLOCK_CLASSES(X) X(32) X(64) X(96) X(128)

// Shared memory of a block at most: of every kernel but those of float32 above H = 96, and of these.
inline constexpr int kLstmBlockSharedBytes = 96 << 10, kLstmBlockSharedBytesAbove96 = 164224;

// Columns of x at most, of a layer whose input projection the kernel computes itself.
inline constexpr int kLstmBlockInput = 32;

}  // namespace fuseblock

// dtype: fuseblock::DType number of T. With more rows than 8 for each multiprocessor, a block takes 16 (not in float32).
extern "C" {
int launch_lstm_block_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream);
int launch_lstm_block_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream);
// Whole layers, in 16 bit; a block always takes 8 rows.
int launch_lstm_block_layer_fwd(const fuseblock::LstmLayerFwd* op, int dtype, void* stream);
}
