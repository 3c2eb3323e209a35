// Arguments of the upfirdn2d CPU kernel: zero insertion, padding, FIR filter and decimation of images.
//
//   y[i, j] = sum_{k, l} w[k, l] u[i down_y + k - pad_y, j down_x + l - pad_x],  u[i up_y, j up_x] = x[i, j], 0 elsewhere
//
// Images are dense: `planes` of pixels (NCHW, channels = 1), or of pixels of `channels` elements (channels-last).
#pragma once

#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

struct Upfirdn2d {
  const void* x;
  void* y;
  const void* weights;  // (taps_y, taps_x) in the compute type: flipped and multiplied by the gain as needed
  DType dtype;
  int64_t planes, channels, in_h, in_w, out_h, out_w;
  int64_t taps_x, taps_y, up_x, up_y, down_x, down_y, pad_x, pad_y;
};

// One row of the filter for the outputs of one phase: product with w[column] of input phase `phase`, `offset` pixels on.
struct RowTap {
  int64_t column, phase, offset;
};

// The outputs of one phase: their taps, how many they are, and which of them have all taps inside of the input row (first_inside
// is -1 if none has).
struct RowPhase {
  int64_t first_tap, last_tap, pixels, first_inside, last_inside;
};

// How rows are worked on. With g = gcd(up_x, down_x), outputs j = q up_x/g + r of one output phase r have the same taps, and
// from q to q + 1 these move by down_x/g input pixels. So input rows are split into down_x/g phases, in which every tap of
// every output phase is a row of consecutive pixels. Rows of several narrow planes lie side by side in one. Rows of pixels
// that fill a vector are not split: `by_pixel`.
struct Upfirdn2dPlan {
  Upfirdn2d args;
  int64_t phases_in, phases_out;
  const RowTap* taps;                  // of output phase 0, 1, ...
  const RowPhase* phases;
  int64_t first_offset;                // smallest offset: pixel p of a split row is p + first_offset
  int64_t split_pixels;                // pixels of a split row, padding included
  int64_t quotients;                   // pixels of an output phase
  int64_t group, groups;               // planes that are worked on at a time; how many times
  int64_t ring_rows;                   // input rows that one output row may need
  int64_t line, whole_line;            // elements of a row in the ring, of all planes of a group, and of one beside it
  bool by_pixel;                       // upfirdn2d_pixels.h, not upfirdn2d_kernels.h
  const void *row_factor = nullptr, *column_factor = nullptr;  // w[k, l] = column[k] row[l], where by_pixel uses that
  int64_t scratch_bytes;               // memory that a thread needs
};

void upfirdn2d(const Upfirdn2d&, const Threads&);

}  // namespace fuseblock::cpu
