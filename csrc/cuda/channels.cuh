// What kernels share whose threads keep to the channels of a tensor: which elements a thread visits, what belongs to their
// channels, and how the sums of threads become one, in a fixed order.
//
// N: elements of a visit, neighbours in memory. L: channels of them, N where the channels are last, else 1; kernels with N = 1
// take either layout. A chunk is the channels of a block: one, or blockDim.x vectors of N of one sample; threads y and the parts
// of a chunk (blocks) share its positions. channel_grid.h launches accordingly.
//
// L = N / 2, channels last: a thread that has too much to keep of every channel shares its vectors with its neighbour in the
// warp. Each moves a whole one, of two positions that follow each other, and computes on half of the channels of both.
#pragma once

#include "cuda/channel_layout.h"
#include "cuda/vector.h"
#include "math/pointwise.h"

namespace fuseblock {

inline constexpr int kChannelThreads = 256;
// Threads of a block that adds up what blocks leave: channels, and shares of what they left.
inline constexpr int kCombineWidth = 32, kCombineHeight = 8;
// Elements of a byte of a mask, which is written by one thread.
inline constexpr int kSpan = 8;

FB_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit divisions are slow.
FB_HD int64_t quotient(unsigned a, int64_t b) { return b > UINT32_MAX ? 0 : a / static_cast<unsigned>(b); }

// Neighbouring bits of a plane, as many as divide 8, from a multiple of that number on.
FB_HD unsigned bits_at(const uint8_t* plane, int64_t offset) { return static_cast<unsigned>(plane[offset >> 3]) >> (offset & 7); }

template <class T, int N>
FB_HD Vec<T, N> load_at(const void* data, int64_t offset) {
  return data == nullptr ? zeros<T, N>() : *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(data) + offset);
}

template <class T, int N>
FB_HD void store_at(void* data, int64_t offset, const Vec<T, N>& x) {
  store_vector(static_cast<T*>(data) + offset, x);
}

// Two neighbours in a warp have a vector each. Afterwards the first has the first halves of both, and the other the second
// halves; done twice, it changes nothing.
template <class V>
__device__ V exchange_halves(const V& mine) {
  constexpr int kHalf = sizeof(V) / 8;
  static_assert(sizeof(V) == 8 * kHalf);
  const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32, pair = 3u << (lane & ~1u);
  const bool second = lane % 2 != 0;
  uint32_t words[2 * kHalf];
  memcpy(words, &mine, sizeof(V));
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t got = __shfl_xor_sync(pair, words[second ? i : kHalf + i], 1);
    words[second ? i : kHalf + i] = got;
  }
  V result;
  memcpy(&result, words, sizeof(V));
  return result;
}

template <int N, int L>
struct ChannelWalk {
  static constexpr bool kLast = L > 1;  // known to be channels-last
  // Threads that share vectors.
  static constexpr int kSharers = L == 1 ? 1 : N / L;
  static_assert(kSharers <= 2);

  bool has_channels;
  int64_t operand;  // place of the first of them
  int64_t offset;   // of the visit: what this thread moves

  // This thread's visits of part number `part` of a chunk.
  __device__ ChannelWalk(const ChannelLayout& layout, unsigned chunk, unsigned part)
      : row_step_(layout.row_step), column_step_(layout.column_step), step_(layout.step) {
    int64_t row_stride;
    if (kLast || layout.channels_last) {
      const int64_t sample = layout.samples == 1 ? 0 : quotient(chunk, layout.chunks);
      const int64_t channel = ((chunk - sample * layout.chunks) * blockDim.x + threadIdx.x) * (N / kSharers);
      has_channels = channel < layout.channels;
      operand = sample * layout.channels + channel;
      const int share = threadIdx.x % kSharers;
      offset = sample * layout.size * layout.channels + channel + share * (layout.channels - L);
      rows_ = has_channels ? divide_up(layout.size, kSharers) : 0, columns_ = 1, row_stride = kSharers * layout.channels;
      rows_without_ = share != 0 ? layout.size % kSharers : 0;
    } else {
      has_channels = true;
      operand = chunk;
      offset = chunk * layout.size;
      rows_ = layout.samples, columns_ = layout.size / N, row_stride = layout.channels * layout.size;
    }
    const unsigned first = part * blockDim.y + threadIdx.y;
    const int64_t row = quotient(first, columns_);
    rows_ -= row, column_ = first - row * columns_;
    offset += row * row_stride + column_ * N;
    wrap_ = row_stride - columns_ * N;
  }
  __device__ bool inside() const { return rows_ > 0; }
  __device__ void next() {
    offset += step_;
    rows_ -= row_step_;
    if constexpr (kLast) return;
    column_ += column_step_;
    if (column_ >= columns_) column_ -= columns_, --rows_, offset += wrap_;
  }

  // The visit's elements, n of channel n % L; zeros of a tensor that is absent, and of a position that is.
  template <class T>
  __device__ Vec<T, N> load(const void* data) const {
    if constexpr (kSharers == 1) return load_at<T, N>(data, offset);
    else return exchange_halves(moves() ? load_at<T, N>(data, offset) : zeros<T, N>());
  }
  template <class T>
  __device__ void store(void* data, const Vec<T, N>& x) const {
    if constexpr (kSharers == 1) {
      store_at(data, offset, x);
    } else {
      const Vec<T, N> whole = exchange_halves(x);
      if (moves()) store_at(data, offset, whole);
    }
  }
  // Their bits of a plane of them, the lowest first; zeros of an absent one.
  __device__ unsigned bits(const uint8_t* plane) const {
    const unsigned own = plane == nullptr || !moves() ? 0u : bits_at(plane, offset);
    if constexpr (kSharers == 1) return own;
    constexpr unsigned kHalf = N / 2, kLow = (1u << kHalf) - 1;
    const auto both = exchange_halves(make_uint2(own & kLow, own >> kHalf));
    return (both.x & kLow) | (both.y & kLow) << kHalf;
  }

 private:
  // Whether there is a vector for this thread: of an odd number of positions, the last one has none behind it.
  __device__ bool moves() const { return kSharers == 1 || rows_ > rows_without_; }

  int rows_without_ = 0;  // 1 where the last row has no vector for this thread
  int64_t rows_, columns_, column_, row_step_, column_step_, step_, wrap_;
};

// What belongs to the channels of a thread.
template <class S, int L>
struct ChannelValues {
  S value[L];

  FB_HD S operator[](int n) const { return value[n % L]; }
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
