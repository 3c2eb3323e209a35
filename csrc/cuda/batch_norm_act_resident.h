// Launchers of batch_norm_act_resident.cuh. Each returns whether the channels fit on the device and its driver has room for the
// clusters; `error`: of the launch.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/launch.h"

namespace fuseblock {

template <class T>
bool resident_fwd(const BatchNormAct& op, const DeviceLimits& device, void* stream, cudaError_t& error);
template <class T>
bool resident_bwd(const BatchNormAct& op, const DeviceLimits& device, void* stream, cudaError_t& error);

}  // namespace fuseblock
