// What the kernels of batch_norm_act share: which elements a thread visits, what belongs to their channels, and how the
// values of threads become one, in a fixed order.
//
// N: neighbouring elements of a visit. L: channels of them, N where the channels are last, else 1; kernels with N = 1 take
// either layout. A chunk is the channels of a block: one, or blockDim.x vectors of N of one sample; threads y and the
// `parts` of a chunk (blocks) share its positions.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/vector.h"
#include "math/pointwise.h"

namespace fuseblock {

inline constexpr int kNormThreads = 256;

FB_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit divisions are slow.
FB_HD int64_t quotient(unsigned a, int64_t b) { return b > UINT32_MAX ? 0 : a / static_cast<unsigned>(b); }

FB_HD int64_t operands(const BatchNormAct& op) { return op.channels_last ? op.samples * op.channels : op.channels; }

// Values behind the statistics of a channel.
FB_HD int64_t values(const BatchNormAct& op) { return op.channels_last ? op.size : op.samples * op.size; }

template <int N>
struct NormWalk {
  bool has_channels;
  int64_t operand;  // place of the first of them
  int64_t offset;   // of the visit

  // This thread's visits of part number `part` of a chunk.
  __device__ NormWalk(const BatchNormAct& op, unsigned chunk, unsigned part)
      : row_step_(op.row_step), column_step_(op.column_step) {
    int64_t row_stride;
    if (op.channels_last) {
      const int64_t sample = op.samples == 1 ? 0 : quotient(chunk, op.chunks);
      const int64_t channel = ((chunk - sample * op.chunks) * blockDim.x + threadIdx.x) * N;
      has_channels = channel < op.channels;
      operand = sample * op.channels + channel;
      offset = sample * op.size * op.channels + channel;
      rows_ = has_channels ? op.size : 0, columns_ = 1, row_stride = op.channels;
    } else {
      has_channels = true;
      operand = chunk;
      offset = chunk * op.size;
      rows_ = op.samples, columns_ = op.size / N, row_stride = op.channels * op.size;
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

template <class S, int L>
struct NormChannels {
  ChannelValues<S, L> mean, invstd, weight, bias, slope;

  FB_HD NormChannels(const BatchNormAct& op, int64_t operand, bool inside)
      : mean(per_channel<S, L>(op.mean, operand, inside, S(0))),
        invstd(per_channel<S, L>(op.invstd, operand, inside, S(0))),
        weight(per_channel<S, L>(op.weight, operand, inside, S(1))),
        bias(per_channel<S, L>(op.bias, operand, inside, S(0))),
        slope(per_channel<S, L>(op.slope, operand, inside, static_cast<S>(op.negative_slope), op.slope_stride)) {}
};

template <class T, int N>
FB_HD Vec<T, N> load_at(const void* data, int64_t offset) {
  return data == nullptr ? zeros<T, N>() : *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(data) + offset);
}

template <class T, int N>
FB_HD void store_at(void* data, int64_t offset, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(data) + offset) = x;
}

// xhat and z of N elements; with a mask, z is only as positive or negative as its bit says.
template <class T, int N, int L>
struct NormPoint {
  using S = State<T>;
  S xhat[N], z[N];

  FB_HD NormPoint(const BatchNormAct& op, const NormChannels<S, L>& c, int64_t offset, const Vec<T, N>& x) {
    const Vec<T, N> residual = load_at<T, N>(op.residual, offset);
    const unsigned bits = op.mask == nullptr ? 0u : static_cast<unsigned>(op.mask[offset >> 3]) >> (offset & 7);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      xhat[n] = (x[n] - c.mean[n]) * c.invstd[n];
      z[n] = c.weight[n] * xhat[n] + c.bias[n] + residual[n];
      if (op.mask != nullptr) z[n] = (bits >> n & 1) != 0 ? S(1) : S(-1);
    }
  }
};

// Calls f with the tag of the activation, one of kSome.
template <Activation... kSome, class F>
FB_HD void with_one_of(Activation a, F&& f) {
  ((a == kSome ? f(ActivationTag<kSome>{}) : void()), ...);
}

// The same; launchers pass identity as leaky_relu with slope 1, and prelu is a leaky_relu but for its slopes' derivatives.
template <class F>
FB_HD void with_activation_of(const BatchNormAct& op, F&& f) {
  using A = Activation;
  const auto a = static_cast<A>(op.activation);
  with_one_of<A::relu, A::leaky_relu, A::silu, A::tanh, A::elu>(a == A::prelu ? A::leaky_relu : a, f);
}
template <class F>
FB_HD void with_activation_or_prelu_of(const BatchNormAct& op, F&& f) {
  using A = Activation;
  with_one_of<A::relu, A::leaky_relu, A::prelu, A::silu, A::tanh, A::elu>(static_cast<A>(op.activation), f);
}

struct AddSums {
  template <int M, class S>
  FB_HD void operator()(S (&own)[M], const S (&other)[M]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) own[m] += other[m];
  }
};

// Moments of L channels as an array: number of values, means, sums of squared deviations.
template <int L>
struct MergeMoments {
  template <class S>
  FB_HD void operator()(S (&own)[2 * L + 1], const S (&other)[2 * L + 1]) const {
    const S total = own[0] + other[0];
    // 0 / 0 where both are empty must not become NaN.
    const S share = other[0] / (total > S(0) ? total : S(1));
#pragma unroll
    for (int l = 1; l <= L; ++l) {
      const S delta = other[l] - own[l];
      own[l] += delta * share;
      own[L + l] += other[L + l] + delta * delta * own[0] * share;
    }
    own[0] = total;
  }
};

// Merges the values of the threads y < height into those of thread y = 0.
template <class Merge, int M, class S>
__device__ void merge_threads(S (&own)[M], int height) {
  FB_SHARED(S, buffer, [M][kNormThreads / 2]);
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

FB_HD float inverse_root(float x) { return 1.f / sqrtf(x); }
FB_HD double inverse_root(double x) { return 1. / sqrt(x); }

// The statistics of a channel, in the form that is asked for.
template <class S>
FB_HD void write_statistics(const BatchNormAct& op, int64_t operand, S mean, S m2) {
  if (op.new_invstd == nullptr) {
    S* const sums = static_cast<S*>(op.sums);
    sums[operand] = mean, sums[operands(op) + operand] = m2;
    return;
  }
  const S var = m2 / static_cast<S>(values(op));
  static_cast<S*>(op.new_mean)[operand] = mean;
  static_cast<S*>(op.new_var)[operand] = var;
  static_cast<S*>(op.new_invstd)[operand] = inverse_root(var + static_cast<S>(op.eps));
}

// k1 and k2 of dx = k0 G + k1 + k2 xhat, from k0 and the sums of G and G xhat.
template <class S>
FB_HD S coefficient(const BatchNormAct& op, S k0, S sum) {
  return -k0 * (sum / static_cast<S>(values(op)));
}

// Sum number `which` of a backward pass, and the coefficients that come of it where they are asked for.
template <class S>
FB_HD void write_sum(const BatchNormAct& op, int which, int64_t operand, S sum) {
  const int64_t distance = operands(op);
  static_cast<S*>(op.sums)[which * distance + operand] = sum;
  if (op.new_k == nullptr || which > 1) return;
  const S invstd = static_cast<const S*>(op.invstd)[operand];
  const S k0 = op.weight == nullptr ? invstd : invstd * static_cast<const S*>(op.weight)[operand];
  S* const k = static_cast<S*>(op.new_k) + operand;
  if (which == 0) k[0] = k0;
  k[(which + 1) * distance] = coefficient(op, k0, sum);
}

}  // namespace fuseblock
