// C interface of the kernels of batch_norm_act: what they compute stands in batch_norm_act.cuh.
//
// Tensors of x's shape have its memory order: (samples, channels, size) contiguous, or channels-last, which is (size,
// channels) with samples = 1. T is their dtype; everything per channel has the dtype S of the statistics (float for 16-bit
// T, else T). Null pointers are absent operands; `mask` holds one bit an element in memory order, the lowest first.
//
// Reductions need a workspace of batch_norm_act_splits() * 12 * channels elements of S where that number is above 1.
// Every launcher returns a cudaError_t; invalid dtypes or sizes beyond the grid give cudaErrorInvalidValue.
#pragma once

#include <cstdint>

namespace fuseblock {

struct BatchNormAct {
  int64_t samples, channels, size;
  bool channels_last;
  int activation;  // enum class Activation
  int slope_stride;  // 0: one slope for all channels
  double negative_slope;

  const void *x, *residual;                            // T
  const void *mean, *invstd, *weight, *bias, *slope;   // S (channels,)
  const uint8_t* mask;                                 // instead of the residual
  const void *dy, *v, *v_residual;                     // T: gradient of y, cotangents of dx and dresidual
  const void* k;                                       // S (3 or 9, channels): coefficients

  void *y, *dx, *dresidual, *a_x, *a_dy, *a_residual;  // T out
  uint8_t* new_mask;                                   // out
  void *sums, *workspace;                              // S out (sums, channels)
};

}  // namespace fuseblock

extern "C" {
int64_t batch_norm_act_splits(const fuseblock::BatchNormAct* op);
// Whether smooth or prelu: ten second-order sums, twelve with v_residual; else five.
int launch_batch_norm_act_stats(const fuseblock::BatchNormAct* op, int dtype, void* stream);
int launch_batch_norm_act_fwd(const fuseblock::BatchNormAct* op, int dtype, void* stream);
int launch_batch_norm_act_bwd_reduce(const fuseblock::BatchNormAct* op, int dtype, void* stream);
int launch_batch_norm_act_bwd(const fuseblock::BatchNormAct* op, int dtype, void* stream);
int launch_batch_norm_act_bwd_bwd_reduce(const fuseblock::BatchNormAct* op, int dtype, void* stream);
int launch_batch_norm_act_bwd_bwd(const fuseblock::BatchNormAct* op, int dtype, void* stream);
}
