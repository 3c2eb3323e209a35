// A kernel so small that its launch is all that it costs, and one that moves memory.
#include "micro.cuh"

namespace {

// The result grows by 1 with every launch.
__global__ void count_kernel(const MicroLaunch m) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<unsigned*>(m.result) += 1;
}

__global__ void copy_kernel(const MicroLaunch m) {
  const int64_t pieces = m.bytes / 16, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto* const source = static_cast<const uint4*>(m.source);
  auto* const result = static_cast<uint4*>(m.result);
#pragma unroll 4
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < pieces; n += stride) {
    result[n] = source[n];
  }
}

}  // namespace

FB_MICRO(count, false, (count_kernel))
FB_MICRO(copy, false, (copy_kernel))
