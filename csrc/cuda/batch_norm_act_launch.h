// What the launchers of batch_norm_act share: choice of dtype, layout and vector width.
#pragma once

#include "cuda/batch_norm_act_point.cuh"
#include "cuda/channel_grid.h"

namespace fuseblock {

// Whether every run of neighbours can be read in vectors of N elements of T.
template <class T, int N>
bool can_vectorise(const BatchNormAct& op) {
  return can_vectorise<T, N>(op, {op.x, op.residual, op.dy, op.v, op.v_residual, op.y, op.dx, op.dresidual, op.a_x, op.a_dy,
                                  op.a_residual});
}

// Calls launch.operator()<T>(op) for the type that the number names, unless there is nothing to do.
template <class Launch>
cudaError_t dispatch_norm(BatchNormAct op, int dtype, Launch launch) {
  if (op.samples < 0 || op.channels < 0 || op.size < 0) return cudaErrorInvalidValue;
  if (op.samples == 0 || op.channels == 0 || op.size == 0) return cudaSuccess;
  if (op.activation == static_cast<int>(Activation::identity)) {
    op.activation = static_cast<int>(Activation::leaky_relu);
    op.negative_slope = 1;
  }
  return dispatch_dtype(dtype, [&]<class T>() { return launch.template operator()<T>(op); });
}

}  // namespace fuseblock
