// C interface of the recurrence with resident weights: the whole sequence of one LSTM layer in one launch.
//
// w_hh stays on chip over all steps, in a *tier*: in one block (lstm_recurrence_block.h), in a cluster of blocks
// (lstm_recurrence_cluster.h), or in the whole grid (lstm_recurrence_grid.h). All tiers take the structs below. T is
// float16, bfloat16 or float32; states are float32. Shapes and meaning of every tensor:
// python/fuseblock/ops/lstm_recurrence.py. A null pointer is an absent tensor. How it works:
// docs/how-the-recurrence-works.md.
//
// Every launcher returns a cudaError_t; dtypes and sizes outside of what its tier says give cudaErrorInvalidValue.
#pragma once

#include <cstdint>

namespace fuseblock {

// A tensor (steps, batch, columns) with contiguous columns; strides in elements.
struct Sequence {
  const void* data;
  int64_t step_stride, row_stride;
};

struct LstmShape {
  int64_t steps, batch, hidden, directions;
  const int64_t* lengths;  // (batch,)
  int multiprocessors;     // of the device
  int64_t shared_bytes;    // of shared memory that a block may have there
  int passes;              // of mma over float32 operands: 1 (they are rounded to TF32) or 3 (nearly float32). Else ignored
};

// Tensors without strides are contiguous. w_hh (directions, 4 * hidden, columns) is aligned to 16 bytes and its rows are
// padded with zeros to the next multiple of 8 columns: kernels that could also read odd rows would have no registers left.
struct LstmFwd {
  LstmShape shape;
  Sequence gx;
  const void *h0, *w_hh;
  const float* c0;
  void *y, *h_n;
  float* c_n;
  void* gates;  // null together with c: no state is saved
  float* c;
  void* workspace;  // see the tier; null where it needs none
  int64_t workspace_bytes;
};

// A whole layer, gx = W_ih x + b_ih + b_hh included: instead of gx, x (steps, batch, input) and its weights, contiguous, of each
// direction. w_ih (4 * hidden, input); b_ih and b_hh (4 * hidden), or null.
struct LstmLayerFwd : LstmFwd {
  Sequence x;
  int64_t input;
  const void *w_ih[2], *b_ih[2], *b_hh[2];
};

struct LstmBwd {
  LstmShape shape;
  Sequence dy;  // this and the next four are optional
  const void* dh_n;
  const float* dc_n;
  const void* d_gates;
  const float* d_c;
  const void* gates;
  const float *c, *c0;
  const void* w_hh;
  void *dgx, *dh0;
  float* dc0;
  void* workspace;
  int64_t workspace_bytes;
};

}  // namespace fuseblock
