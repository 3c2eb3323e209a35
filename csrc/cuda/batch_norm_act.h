// C interface of the kernels of batch_norm_act: what they compute stands in batch_norm_act.cuh.
//
// Tensors of x's shape have its memory order: (samples, channels, size) contiguous, or channels-last, which is (samples,
// size, channels). T is their dtype; everything per channel has the dtype S of the statistics (float for 16-bit T, else T).
// Contiguous channels have their statistics over all samples; channels-last ones over one sample, of which a batch norm
// therefore has one: its size is that of all samples. What is (operands,) is (channels,) or, channels-last, (samples
// channels,). Null pointers are absent operands; `mask` holds one bit an element in memory order, the lowest first.
//
// Reductions need a workspace of batch_norm_act_splits() * 12 * operands elements of S where that number is above 1.
// Every launcher returns a cudaError_t; invalid dtypes or sizes beyond the grid give cudaErrorInvalidValue.
#pragma once

#include <cstdint>

#include "cuda/channel_layout.h"
#include "cuda/placement.h"

namespace fuseblock {

struct BatchNormAct : ChannelLayout {
  int activation;  // enum class Activation
  int slope_stride;  // 0: one slope for all channels
  double negative_slope, eps;

  const void *x, *residual;                            // T
  const void *mean, *invstd, *weight, *bias, *slope;   // S (operands,)
  const uint8_t* mask;                                 // instead of the residual
  const void *dy, *v, *v_residual;                     // T: gradient of y, cotangents of dx and dresidual
  const void* k;                                       // S (3 or 9, operands): coefficients

  void *y, *dx, *dresidual, *a_x, *a_dy, *a_residual;  // T out
  uint8_t* new_mask;                                   // out
  void *sums, *workspace;                              // S out (sums, operands)
  void *new_mean, *new_var, *new_invstd;               // S out (operands,)
  void* new_k;                                         // S out (3, operands)
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

// Statistics and y (new_mean, new_var, new_invstd, y, new_mask) in one launch where a channel fits into the shared memory of
// a cluster of blocks (batch_norm_act_resident.cuh), in two or three where not; and the same for sums and dx, dresidual,
// which need new_k as well.
int launch_batch_norm_act_whole_fwd(const fuseblock::BatchNormAct* op, int dtype, const fuseblock::DeviceLimits* device,
                                    void* stream);
int launch_batch_norm_act_whole_bwd(const fuseblock::BatchNormAct* op, int dtype, const fuseblock::DeviceLimits* device,
                                    void* stream);
}
