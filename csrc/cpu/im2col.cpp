#include "im2col.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fuseblock::cpu {

namespace {

// Rows are short, mostly: a call of memcpy would take longer than the copy.
void copy_row(const float* from, float* to, int64_t count) {
  constexpr int64_t kStep = 8;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, kStep * sizeof(float));
  for (; i < count; ++i) to[i] = from[i];
}

// What the outputs meet of one channel, with its padding, as rows of every stride_w-th pixel: (phase, row, pixel).
struct Split {
  const Im2col& a;
  const int64_t rows, pixels;
  std::vector<float> values;

  explicit Split(const Im2col& a)
      : a(a),
        rows((a.rows - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1),
        pixels(a.out_w + (a.kernel_w - 1) * a.dilation_w / a.stride_w),
        values((size_t)(a.stride_w * rows * pixels)) {}

  float* row(int64_t phase, int64_t r) { return values.data() + (phase * rows + r) * pixels; }

  void fill(int64_t channel) {
    for (int64_t phase = 0; phase < a.stride_w; ++phase) {
      // Pixels [begin, end) are inside of the image, the first of them at input column `column`.
      const int64_t shift = phase - a.pad_w;
      const int64_t begin = std::clamp<int64_t>(shift < 0 ? (a.stride_w - 1 - shift) / a.stride_w : 0, 0, pixels);
      const int64_t column = begin * a.stride_w + shift;
      const int64_t end = column < a.in_w ? std::min(pixels, begin + (a.in_w - 1 - column) / a.stride_w + 1) : begin;
      for (int64_t r = 0; r < rows; ++r) {
        float* const to = row(phase, r);
        const int64_t in_row = a.first * a.stride_h - a.pad_h + r;
        if (in_row < 0 || in_row >= a.in_h) {
          std::fill_n(to, pixels, 0.0f);
          continue;
        }
        const float* const from = a.x + (channel * a.in_h + in_row) * a.in_w + column;
        std::fill_n(to, begin, 0.0f);
        for (int64_t i = 0; i < end - begin; ++i) to[begin + i] = from[i * a.stride_w];
        std::fill_n(to + end, pixels - end, 0.0f);
      }
    }
  }

  void write(int64_t k, int64_t l, float* to) {
    const int64_t shift = l * a.dilation_w;
    for (int64_t i = 0; i < a.rows; ++i, to += a.out_w) {
      copy_row(row(shift % a.stride_w, i * a.stride_h + k * a.dilation_h) + shift / a.stride_w, to, a.out_w);
    }
  }
};

}  // namespace

void im2col(const Im2col& a) {
  Split split(a);
  const int64_t taps = a.kernel_h * a.kernel_w;
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    split.fill(channel);
    for (int64_t tap = 0; tap < taps; ++tap) {
      split.write(tap / a.kernel_w, tap % a.kernel_w, a.columns + (channel * taps + tap) * a.rows * a.out_w);
    }
  }
}

}  // namespace fuseblock::cpu
