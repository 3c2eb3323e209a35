// What kernels share whose threads keep to the channels of a tensor: which elements a thread visits, what belongs to their
// channels, and how the sums of threads become one, in a fixed order.
//
// N: neighbouring elements of a visit. L: channels of them, N where the channels are last, else 1; kernels with N = 1 take
// either layout. A chunk is the channels of a block: one, or blockDim.x vectors of N of one sample; threads y and the parts
// of a chunk (blocks) share its positions. channel_grid.h launches accordingly.
#pragma once

#include "cuda/channel_layout.h"
#include "cuda/vector.h"
#include "math/pointwise.h"

namespace fuseblock {

inline constexpr int kChannelThreads = 256;
// Elements of a byte of a mask, which is written by one thread.
inline constexpr int kSpan = 8;

FB_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit divisions are slow.
FB_HD int64_t quotient(unsigned a, int64_t b) { return b > UINT32_MAX ? 0 : a / static_cast<unsigned>(b); }

template <int N>
struct ChannelWalk {
  bool has_channels;
  int64_t operand;  // place of the first of them
  int64_t offset;   // of the visit

  // This thread's visits of part number `part` of a chunk.
  __device__ ChannelWalk(const ChannelLayout& layout, unsigned chunk, unsigned part)
      : row_step_(layout.row_step), column_step_(layout.column_step) {
    int64_t row_stride;
    if (layout.channels_last) {
      const int64_t sample = layout.samples == 1 ? 0 : quotient(chunk, layout.chunks);
      const int64_t channel = ((chunk - sample * layout.chunks) * blockDim.x + threadIdx.x) * N;
      has_channels = channel < layout.channels;
      operand = sample * layout.channels + channel;
      offset = sample * layout.size * layout.channels + channel;
      rows_ = has_channels ? layout.size : 0, columns_ = 1, row_stride = layout.channels;
    } else {
      has_channels = true;
      operand = chunk;
      offset = chunk * layout.size;
      rows_ = layout.samples, columns_ = layout.size / N, row_stride = layout.channels * layout.size;
    }
    const unsigned first = part * blockDim.y + threadIdx.y;
    row_ = quotient(first, columns_), column_ = first - row_ * columns_;
    offset += row_ * row_stride + column_ * N;
    step_ = row_step_ * row_stride + column_step_ * N;
    wrap_ = row_stride - columns_ * N;
  }
  __device__ bool inside() const { return row_ < rows_; }
  __device__ void next() {
    offset += step_;
    row_ += row_step_;
    column_ += column_step_;
    if (column_ >= columns_) column_ -= columns_, ++row_, offset += wrap_;
  }

 private:
  int64_t rows_, columns_, row_, column_, row_step_, column_step_, step_, wrap_;
};

// What belongs to the channels of a thread.
template <class S, int L>
struct ChannelValues {
  S value[L];

  FB_HD S operator[](int n) const { return value[L == 1 ? 0 : n]; }
};

template <class S, int L>
FB_HD ChannelValues<S, L> per_channel(const void* data, int64_t operand, bool inside, S otherwise, int stride = 1) {
  ChannelValues<S, L> r;
#pragma unroll
  for (int n = 0; n < L; ++n) {
    r.value[n] = data != nullptr && inside ? static_cast<const S*>(data)[(operand + n) * stride] : otherwise;
  }
  return r;
}

template <class T, int N>
FB_HD Vec<T, N> load_at(const void* data, int64_t offset) {
  return data == nullptr ? zeros<T, N>() : *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(data) + offset);
}

template <class T, int N>
FB_HD void store_at(void* data, int64_t offset, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(data) + offset) = x;
}

// Calls f with the tag of the activation, one of kSome.
template <Activation... kSome, class F>
FB_HD void with_one_of(Activation a, F&& f) {
  ((a == kSome ? f(ActivationTag<kSome>{}) : void()), ...);
}

struct AddSums {
  template <int M, class S>
  FB_HD void operator()(S (&own)[M], const S (&other)[M]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) own[m] += other[m];
  }
};

// Merges the values of the threads y < height into those of thread y = 0.
template <class Merge, int M, class S>
__device__ void merge_threads(S (&own)[M], int height) {
  FB_SHARED(S, buffer, [M][kChannelThreads / 2]);
  const int width = blockDim.x, y = threadIdx.y;
  int half = 1;
  while (2 * half < height) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (y >= half && y < 2 * half && y < height) {
#pragma unroll
      for (int m = 0; m < M; ++m) buffer[m][(y - half) * width + threadIdx.x] = own[m];
    }
    __syncthreads();
    if (y < half && y + half < height) {
      S other[M];
#pragma unroll
      for (int m = 0; m < M; ++m) other[m] = buffer[m][y * width + threadIdx.x];
      Merge()(own, other);
    }
  }
}

}  // namespace fuseblock
