// C interface of the upfirdn2d kernels: zero insertion, padding, FIR filter and decimation of images.
//
//   y[i, j] = gain sum_{k, l} f'[k, l] u[i down_y + k - pad_y, j down_x + l - pad_x],  u[i up_y, j up_x] = x[i, j], 0 elsewhere
//
// f' is f if flip_filter, else f turned by 180 degrees. Images are dense: `planes` of pixels (NCHW, channels = 1), or of
// pixels of `channels` elements (channels-last). x and y have dtype T, f the state dtype (float for 16-bit T, else T).
#pragma once

#include <cstdint>

namespace fuseblock {

struct Upfirdn2d {
  const void* x;
  const void* f;  // (taps_y, taps_x)
  void* y;
  int64_t planes, channels;
  int32_t in_h, in_w, out_h, out_w;
  int32_t taps_x, taps_y, up_x, up_y, down_x, down_y, pad_x, pad_y;
  bool flip_filter;
  double gain;
};

}  // namespace fuseblock

// dtype: fuseblock::DType number of T. Returns a cudaError_t; cudaErrorInvalidValue for images beyond 2^31 outputs a plane.
extern "C" int launch_upfirdn2d(const fuseblock::Upfirdn2d* op, int dtype, void* stream);
