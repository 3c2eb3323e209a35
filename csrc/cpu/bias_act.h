// Arguments of the bias_act CPU kernels: y = clamp(gain act(x + b), -clamp, clamp) and its derivatives of first and second
// order. Equations and the meaning of the mask: python/fuseblock/reference/bias_act.py. Activations: csrc/math/pointwise.h.
//
// Full tensors are dense, all in one layout, in the storage type; element i belongs to channel (i / inner) % channels, so
// inner is the number of pixels, or 1 with the channels last. Parameters and sums of a channel have the compute type.
#pragma once

#include <cstdint>

#include "../math/bias_act.h"
#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

struct BiasActSite {
  DType dtype;
  Activation activation;
  int64_t count, channels, inner;
  double negative_slope, gain, clamp;  // clamp: infinity for none
  const void *bias, *slope;            // (channels,), null: zeros
  const uint8_t* mask;                 // the planes, one after the other; null in forward and where x is kept
  int64_t period;                      // 0, or the parameters are repeated over this many elements (set by bias_act.cpp)
};

struct BiasActFwd {
  BiasActSite site;
  const void* x;
  void* y;
  uint8_t* mask;  // null: not wanted
};

struct BiasActBwdArgs {
  BiasActSite site;
  const void *dy, *x;  // x: null for activations that save the mask
  void* dx;
  void *dbias, *dslope;  // (channels,), null: not wanted
};

struct BiasActBwdBwdArgs {
  BiasActSite site;
  const void *v, *v_bias, *v_slope;  // parameters of a channel: null is zeros
  const void *dy, *x;                // null for activations that save the mask, as the outputs that follow a_dy
  void *a_dy, *a_x, *a_bias, *a_slope;
};

void bias_act(const BiasActFwd&, const Threads&);
void bias_act_bwd(const BiasActBwdArgs&, const Threads&);
void bias_act_bwd_bwd(const BiasActBwdBwdArgs&, const Threads&);

}  // namespace fuseblock::cpu
