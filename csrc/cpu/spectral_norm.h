// Spectral normalisation of many weights: y = W / sigma, sigma = u^T W v. Equations: functional/_spectral.py.
//
// W has `rows` rows, one for each output channel, and a row is `segments` pieces of `length` elements: one piece where the
// output channels are the outermost dimension, else (transposed convolutions) pieces rows * length apart. Bytes moved for
// each element of W in training: read twice and written once forward (the image W^T u is summed while a row is in cache),
// dy and W read and dy read again and dW written backward.
#pragma once

#include <cstdint>
#include <vector>

#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

struct SpectralMatrix {
  int64_t rows, segments, length;
  const void *w, *dy;
  void* out;              // y, or dW
  void *u, *v, *sigma;    // `rows`, `segments * length` and one element
  int64_t columns() const { return segments * length; }
};

// Rows [begin, end) of one matrix.
struct SpectralKernels {
  // products[r] = <row r, v>; where image is given: image = sum of products[r] * row r.
  void (*product)(const SpectralMatrix&, DType, void* products, void* image, int64_t begin, int64_t end);
  void (*scale)(const SpectralMatrix&, DType, int64_t begin, int64_t end);              // out = w / sigma
  double (*inner)(const SpectralMatrix&, DType, int64_t begin, int64_t end);            // <dy, w>
  // out = (dy - inner / sigma * u v^T) / sigma
  void (*gradient)(const SpectralMatrix&, DType, double inner, int64_t begin, int64_t end);
};

// u and v, given, are iterated (0 times: left), then sigma and out are computed.
void spectral_norm(const std::vector<SpectralMatrix>&, DType, int64_t n_power_iterations, double eps, const Threads&);
void spectral_norm_bwd(const std::vector<SpectralMatrix>&, DType, const Threads&);

}  // namespace fuseblock::cpu
