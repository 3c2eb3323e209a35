// C interface of the recurrence's block tier: the whole sequence of one LSTM layer in one launch, for small H.
//
// One block keeps w_hh of its direction in registers over all steps; blocks share nothing but inputs. T is float16 or
// bfloat16; states are float32. Shapes and meaning of every tensor: python/fuseblock/ops/lstm_recurrence.py. A null pointer
// is an absent tensor. How it works: docs/how-the-recurrence-works.md.
//
// Every launcher returns a cudaError_t; dtypes and sizes outside of what is said here give cudaErrorInvalidValue.
#pragma once

#include <cstdint>

namespace fuseblock {

// The sizes that the kernels are compiled for, and the only list of them. Smaller H is padded with zero units up to the next.
#define FB_LSTM_BLOCK_CLASSES(X) X(32) X(64) X(96) X(128)
inline constexpr int kLstmBlockLargestHidden = 128;

// A tensor (steps, batch, columns) with contiguous columns; strides in elements.
struct Sequence {
  const void* data;
  int64_t step_stride, row_stride;
};

struct LstmBlockShape {
  int64_t steps, batch, hidden, directions;
  const int64_t* lengths;  // (batch,)
  int multiprocessors;     // of the device: more blocks than these take 16 rows each, otherwise 8
};

// Tensors without strides are contiguous. w_hh (directions, 4 * hidden, columns) is aligned to 16 bytes and its rows are
// padded with zeros to the next multiple of 8 columns: kernels that could also read odd rows would have no registers left.
struct LstmBlockFwd {
  LstmBlockShape shape;
  Sequence gx;
  const void *h0, *w_hh;
  const float* c0;
  void *y, *h_n;
  float* c_n;
  void* gates;  // null together with c: no state is saved
  float* c;
};

struct LstmBlockBwd {
  LstmBlockShape shape;
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
};

}  // namespace fuseblock

// dtype: fuseblock::DType number of T.
extern "C" {
int launch_lstm_block_fwd(const fuseblock::LstmBlockFwd* op, int dtype, void* stream);
int launch_lstm_block_bwd(const fuseblock::LstmBlockBwd* op, int dtype, void* stream);
}
