// C interface of the bias_act kernels: y = clamp(gain act(x + b), -clamp, clamp) and its derivatives of first and second
// order. Equations and the meaning of the mask: python/fuseblock/reference/bias_act.py.
//
// Full tensors are dense, all in one layout, of dtype T; channels-last ones have one sample, with the pixels of all. Parameters
// and sums of a channel are S (float for 16-bit T, else T).
// Every launcher returns a cudaError_t.
#pragma once

#include <cstdint>

#include "cuda/channel_layout.h"

namespace fuseblock {

struct BiasAct : ChannelLayout {
  int activation;                      // a number of enum class Activation
  double negative_slope, gain, clamp;  // clamp: infinity for none
  const void *bias, *slope;            // S (channels,); null: zeros
  const void* x;                       // T; null in the derivatives of activations that save the mask
  const void* dy;                      // T: backward; second order unless the mask is saved
  const void *v, *v_bias, *v_slope;    // second order: cotangents T, S, S; of a channel null is zeros
  const uint8_t* mask;                 // the planes, one after the other; null where x is kept
  void* out;                           // T: y, dx or a_dy
  void* a_x;                           // T: second order where x is kept
  uint8_t* new_mask;                   // forward; null: not wanted
  void *sums, *slope_sums;             // S (channels,): of dz or a_z, and of prelu's slope; null: not wanted
  void* partials;                      // S (1, prelu 2, splits, channels): scratch; null if both are not wanted
};

}  // namespace fuseblock

extern "C" {
// The splits of `partials`; they depend on the sizes alone, and so do the sums' values.
int64_t bias_act_splits(const fuseblock::BiasAct* op);
// dtype: the fuseblock::DType number of T.
int launch_bias_act_fwd(const fuseblock::BiasAct* op, int dtype, void* stream);
int launch_bias_act_bwd(const fuseblock::BiasAct* op, int dtype, void* stream);
int launch_bias_act_bwd_bwd(const fuseblock::BiasAct* op, int dtype, void* stream);
}
