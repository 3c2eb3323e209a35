// Columns of an image: what turns a convolution and its weight gradient into matrix products. Each row of `columns` holds
// what one weight of a filter meets at all output pixels:
//
//   columns[(c, k, l), (i, j)] = x[c, (first + i) stride_h + k dilation_h - pad_h, j stride_w + l dilation_w - pad_w], 0 outside
#pragma once

#include <cstdint>

namespace fuseblock::cpu {

struct Im2col {
  const float* x;  // (channels, in_h, in_w), dense
  float* columns;  // (channels kernel_h kernel_w, rows out_w), dense
  int64_t channels, in_h, in_w, first, rows, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

void im2col(const Im2col&);

}  // namespace fuseblock::cpu
