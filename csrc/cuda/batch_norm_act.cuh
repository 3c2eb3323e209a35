// Batch normalisation, activation and optional residual: z = w xhat + b + r, xhat = (x - mean) invstd, y = act(z).
//
//   backward      G = dy act'(z): sums of G, G xhat, prelu: dy min(z, 0);   dx = k0 G + k1 + k2 xhat, dr = G
//   second order  V, v_r cotangents of dx, dr; h = dy act''(z) (prelu: dy [z <= 0]): sums of V, V xhat, G, G xhat, G V, and
//                 unless act is piecewise with fixed slopes of h, h xhat, h xhat^2, h V, h V xhat, h v_r, h v_r xhat;
//                 q = k0 V + k1 + k2 xhat + v_r, a_dy = q act'(z) + k3 min(z, 0), a_z = a_r = h q (prelu: k3 h, others 0),
//                 a_x = k4 V + k5 G + k6 a_z + k7 + k8 xhat
//
// Passes over the tensor: statistics 1, forward 2, backward 2 and 3, second order 3 and 5, one more each with a residual
// or v_r; a mask is an eighth of a byte an element. Accesses are 16 bytes where rows are aligned (second order: at most 4
// elements, for registers). Sums are added in a fixed order: thread, block, blocks. Statistics by Chan, Golub, LeVeque 1979.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/vector.h"
#include "math/pointwise.h"

namespace fuseblock {

inline constexpr int kNormThreads = 256;
// Sums that a block adds up at a time: bounds the shared memory.
inline constexpr int kSumsAtOnce = 4;

// The N neighbouring elements that a thread visits one after the other, all of one channel, or (kLast) always of the same
// N channels. Block: x channels (kLast), y positions; grid: x channels, y positions.
template <int N, bool kLast>
struct NormWalk {
  int64_t channels, size, channel, row, end, column, columns, row_step, column_step;

  __device__ explicit NormWalk(const BatchNormAct& op) : channels(op.channels), size(op.size) {
    const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    if constexpr (kLast) {
      channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
      row = first, row_step = step, end = channel < channels ? size : 0;
      column = columns = column_step = 0;
    } else {
      channel = blockIdx.x;
      columns = size / N, end = op.samples;
      row = first / columns, column = first % columns;
      row_step = step / columns, column_step = step % columns;
    }
  }
  __device__ bool inside() const { return row < end; }
  __device__ int64_t offset() const {
    return kLast ? row * channels + channel : (row * channels + channel) * size + column * N;
  }
  __device__ void next() {
    row += row_step;
    if constexpr (!kLast) {
      column += column_step;
      if (column >= columns) column -= columns, ++row;
    }
  }
};

// What belongs to the channels of a thread; L: N of them or one.
template <class S, int L>
struct ChannelValues {
  S value[L];

  FB_HD S operator[](int n) const { return value[L == 1 ? 0 : n]; }
};

template <class S, int L>
FB_HD ChannelValues<S, L> per_channel(const void* data, int64_t channel, int64_t channels, S otherwise, int stride = 1) {
  ChannelValues<S, L> r;
#pragma unroll
  for (int n = 0; n < L; ++n) {
    const bool given = data != nullptr && channel + n < channels;
    r.value[n] = given ? static_cast<const S*>(data)[(channel + n) * stride] : otherwise;
  }
  return r;
}

template <class S, int L>
struct NormChannels {
  ChannelValues<S, L> mean, invstd, weight, bias, slope;

  FB_HD NormChannels(const BatchNormAct& op, int64_t channel)
      : mean(per_channel<S, L>(op.mean, channel, op.channels, S(0))),
        invstd(per_channel<S, L>(op.invstd, channel, op.channels, S(0))),
        weight(per_channel<S, L>(op.weight, channel, op.channels, S(1))),
        bias(per_channel<S, L>(op.bias, channel, op.channels, S(0))),
        slope(per_channel<S, L>(op.slope, channel, op.channels, static_cast<S>(op.negative_slope), op.slope_stride)) {}
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

  FB_HD NormPoint(const BatchNormAct& op, const NormChannels<S, L>& c, int64_t offset) {
    const Vec<T, N> x = load_at<T, N>(op.x, offset), residual = load_at<T, N>(op.residual, offset);
    const unsigned bits = op.mask == nullptr ? 0u : static_cast<unsigned>(op.mask[offset >> 3]) >> (offset & 7);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      xhat[n] = (x[n] - c.mean[n]) * c.invstd[n];
      z[n] = c.weight[n] * xhat[n] + c.bias[n] + residual[n];
      if (op.mask != nullptr) z[n] = (bits >> n & 1) != 0 ? S(1) : S(-1);
    }
  }
};

// The sum of every value over the threads that share channels; of thread y = 0.
template <class S, int K, int L>
__device__ void sum_over_positions(S (&value)[K][L]) {
  FB_SHARED(S, buffer, [kSumsAtOnce * L * kNormThreads]);
  const int width = blockDim.x, height = blockDim.y, place = threadIdx.y * width + threadIdx.x;
  for (int start = 0; start < K; start += kSumsAtOnce) {
    const auto slot = [&](int k, int l, int at) -> S& { return buffer[(k * L + l) * kNormThreads + at]; };
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < start || k >= start + kSumsAtOnce) continue;
#pragma unroll
      for (int l = 0; l < L; ++l) slot(k - start, l, place) = value[k][l];
    }
    const int count = K - start < kSumsAtOnce ? K - start : kSumsAtOnce;
    for (int half = kNormThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.y) < half && static_cast<int>(threadIdx.y) + half < height) {
        for (int k = 0; k < count; ++k) {
#pragma unroll
          for (int l = 0; l < L; ++l) slot(k, l, place) += slot(k, l, place + half * width);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < start || k >= start + kSumsAtOnce) continue;
#pragma unroll
      for (int l = 0; l < L; ++l) value[k][l] = slot(k - start, l, place);
    }
  }
}

// Writes this block's share (sums, channels) of `rows` sums, of which value has the first K.
template <class S, int K, int L>
__device__ void store_sums(void* out, int rows, int64_t channel, int64_t channels, const S (&value)[K][L]) {
  if (threadIdx.y != 0) return;
  S* share = static_cast<S*>(out) + blockIdx.y * rows * channels;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (k < rows && channel + l < channels) share[k * channels + channel + l] = value[k][l];
    }
  }
}

// Number, mean and sum of squared deviations of some values.
template <class S>
struct Moments {
  S count, mean, m2;

  FB_HD void merge(const Moments& other) {
    const S total = count + other.count;
    // 0 / 0 where both are empty must not become NaN.
    const S share = other.count / (total > S(0) ? total : S(1)), delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_stats_kernel(const BatchNormAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  FB_SHARED(S, buffer, [3 * L * kNormThreads]);
  Moments<S> own[L] = {};
  NormWalk<N, kLast> walk(op);
  for (; walk.inside(); walk.next()) {
    const Vec<T, N> x = load_at<T, N>(op.x, walk.offset());
    if constexpr (kLast) {
#pragma unroll
      for (int n = 0; n < N; ++n) own[n].merge({S(1), x[n], S(0)});
    } else {
      Moments<S> few{S(N), S(0), S(0)};
#pragma unroll
      for (int n = 0; n < N; ++n) few.mean += x[n] / S(N);
#pragma unroll
      for (int n = 0; n < N; ++n) few.m2 += (x[n] - few.mean) * (x[n] - few.mean);
      own[0].merge(few);
    }
  }
  const int width = blockDim.x, height = blockDim.y, place = threadIdx.y * width + threadIdx.x;
  const auto slot = [&](int k, int l, int at) -> S& { return buffer[(k * L + l) * kNormThreads + at]; };
  for (int half = kNormThreads / 2; half > 0; half /= 2) {
    const int y = threadIdx.y;
    if (y >= half && y < 2 * half) {
#pragma unroll
      for (int l = 0; l < L; ++l) slot(0, l, place) = own[l].count, slot(1, l, place) = own[l].mean, slot(2, l, place) = own[l].m2;
    }
    __syncthreads();
    if (y < half && y + half < height) {
      const int at = place + half * width;
#pragma unroll
      for (int l = 0; l < L; ++l) own[l].merge({slot(0, l, at), slot(1, l, at), slot(2, l, at)});
    }
    __syncthreads();
  }
  S value[3][L];
#pragma unroll
  for (int l = 0; l < L; ++l) value[0][l] = own[l].mean, value[1][l] = own[l].m2, value[2][l] = own[l].count;
  // A block that is alone writes the result: mean and sum of squared deviations.
  store_sums<S, 3, L>(gridDim.y == 1 ? op.sums : op.workspace, gridDim.y == 1 ? 2 : 3, walk.channel, op.channels, value);
}

inline constexpr int kCombineWidth = 32, kCombineHeight = 8;

// Combines the shares of all blocks: thread x a channel, y every eighth block.
template <class S>
__global__ void __launch_bounds__(kCombineWidth* kCombineHeight)
    batch_norm_act_combine_stats_kernel(const BatchNormAct op, int splits) {
  FB_SHARED(Moments<S>, buffer, [kCombineHeight][kCombineWidth]);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kCombineWidth + threadIdx.x;
  const S* share = static_cast<const S*>(op.workspace) + channel;
  Moments<S> own{};
  if (channel < op.channels) {
    for (int64_t split = threadIdx.y; split < splits; split += kCombineHeight) {
      const S* of = share + split * 3 * op.channels;
      own.merge({of[2 * op.channels], of[0], of[op.channels]});
    }
  }
  buffer[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= op.channels) return;
  for (int y = 1; y < kCombineHeight; ++y) own.merge(buffer[y][threadIdx.x]);
  static_cast<S*>(op.sums)[channel] = own.mean;
  static_cast<S*>(op.sums)[op.channels + channel] = own.m2;
}

// The same for sums; blockIdx.y: which sum.
template <class S>
__global__ void __launch_bounds__(kCombineWidth* kCombineHeight)
    batch_norm_act_combine_sums_kernel(const BatchNormAct op, int splits) {
  FB_SHARED(S, buffer, [kCombineHeight][kCombineWidth]);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kCombineWidth + threadIdx.x;
  const S* share = static_cast<const S*>(op.workspace) + blockIdx.y * op.channels + channel;
  S own(0);
  if (channel < op.channels) {
    for (int64_t split = threadIdx.y; split < splits; split += kCombineHeight) {
      own += share[split * gridDim.y * op.channels];
    }
  }
  buffer[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= op.channels) return;
  for (int y = 1; y < kCombineHeight; ++y) own += buffer[y][threadIdx.x];
  static_cast<S*>(op.sums)[blockIdx.y * op.channels + channel] = own;
}

// One thread does eight neighbouring elements, whatever their channels, so that each byte of the mask has one writer.
// N: elements of one access; channels-last tensors come as rows of size 1.
template <class T, int N>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_fwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  const int64_t total = op.samples * op.channels * op.size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x) * 8;
  if (first >= total) return;
  int64_t channel, position;
  if (total <= UINT32_MAX) {  // 64-bit divisions are slow
    const unsigned row = static_cast<unsigned>(first) / static_cast<unsigned>(op.size);
    channel = row % static_cast<unsigned>(op.channels);
    position = static_cast<unsigned>(first) - row * static_cast<unsigned>(op.size);
  } else {
    const int64_t row = first / op.size;
    channel = row % op.channels;
    position = first - row * op.size;
  }
  const auto activation = static_cast<Activation>(op.activation);
  NormChannels<S, 1> c(op, channel);
  unsigned bits = 0;
#pragma unroll
  for (int start = 0; start < 8; start += N) {
    if (first + start >= total) break;
    const Vec<T, N> x = load_at<T, N>(op.x, first + start), residual = load_at<T, N>(op.residual, first + start);
    S z[N], slope[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      z[n] = c.weight[0] * ((x[n] - c.mean[0]) * c.invstd[0]) + c.bias[0] + residual[n];
      slope[n] = c.slope[0];
      if (++position == op.size) {
        position = 0;
        channel = channel + 1 == op.channels ? 0 : channel + 1;
        c = NormChannels<S, 1>(op, channel);
      }
      const bool positive = activation == Activation::relu ? !(z[n] <= S(0)) : z[n] > S(0);
      bits |= (positive ? 1u : 0u) << (start + n);
    }
    Vec<T, N> y;
    with_activation(activation, [&](auto tag) {
#pragma unroll
      for (int n = 0; n < N; ++n) y.set(n, act<decltype(tag)::value>(z[n], slope[n]));
    });
    store_at(op.y, first + start, y);
  }
  if (op.new_mask != nullptr) op.new_mask[first >> 3] = static_cast<uint8_t>(bits);
}

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_bwd_reduce_kernel(const BatchNormAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  NormWalk<N, kLast> walk(op);
  const NormChannels<S, L> c(op, walk.channel);
  const auto activation = static_cast<Activation>(op.activation);
  S sum[3][L] = {};
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset();
    const NormPoint<T, N, L> at(op, c, offset);
    const Vec<T, N> dy = load_at<T, N>(op.dy, offset);
    with_activation(activation, [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S g = act_bwd<A>(dy[n], at.z[n], c.slope[n]);
        sum[0][n % L] += g;
        sum[1][n % L] += g * at.xhat[n];
        if constexpr (A == Activation::prelu) sum[2][n % L] += dy[n] * negative_part(at.z[n]);
      }
    });
  }
  sum_over_positions<S, 3, L>(sum);
  const int rows = activation == Activation::prelu ? 3 : 2;
  store_sums<S, 3, L>(gridDim.y == 1 ? op.sums : op.workspace, rows, walk.channel, op.channels, sum);
}

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_bwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  NormWalk<N, kLast> walk(op);
  const NormChannels<S, L> c(op, walk.channel);
  const S* k = static_cast<const S*>(op.k);
  const auto k0 = per_channel<S, L>(k, walk.channel, op.channels, S(0));
  const auto k1 = per_channel<S, L>(k + op.channels, walk.channel, op.channels, S(0));
  const auto k2 = per_channel<S, L>(k + 2 * op.channels, walk.channel, op.channels, S(0));
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset();
    const NormPoint<T, N, L> at(op, c, offset);
    const Vec<T, N> dy = load_at<T, N>(op.dy, offset);
    Vec<T, N> dx, dresidual;
    with_activation(static_cast<Activation>(op.activation), [&](auto tag) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S g = act_bwd<decltype(tag)::value>(dy[n], at.z[n], c.slope[n]);
        dx.set(n, k0[n] * g + k1[n] + k2[n] * at.xhat[n]);
        dresidual.set(n, g);
      }
    });
    store_at(op.dx, offset, dx);
    if (op.dresidual != nullptr) store_at(op.dresidual, offset, dresidual);
  }
}

// G and h of one element.
template <Activation A, class S>
FB_HD Curve<S> second_factors(S dy, S z, S slope) {
  if constexpr (is_smooth(A)) {
    const Curve<S> curve = act_curve<A>(z);
    return {dy * curve.first, dy * curve.second};
  } else {
    return {act_bwd<A>(dy, z, slope), where_positive(z, S(0), dy)};  // h counts for prelu alone
  }
}

// K: 5, or 12 for prelu and smooth activations, of which ten are written without v_residual.
template <class T, int N, bool kLast, int K>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_bwd_bwd_reduce_kernel(const BatchNormAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  NormWalk<N, kLast> walk(op);
  const NormChannels<S, L> c(op, walk.channel);
  S sum[K][L] = {};
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset();
    const NormPoint<T, N, L> at(op, c, offset);
    const Vec<T, N> dy = load_at<T, N>(op.dy, offset), v = load_at<T, N>(op.v, offset);
    const Vec<T, N> v_residual = K == 12 ? load_at<T, N>(op.v_residual, offset) : zeros<T, N>();
    with_activation(static_cast<Activation>(op.activation), [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
      if constexpr ((A >= Activation::prelu) == (K == 12)) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const S xhat = at.xhat[n];
          const Curve<S> gh = second_factors<A>(dy[n], at.z[n], c.slope[n]);
          const S g = gh.first;
          const int l = n % L;
          sum[0][l] += v[n];
          sum[1][l] += v[n] * xhat;
          sum[2][l] += g;
          sum[3][l] += g * xhat;
          sum[4][l] += g * v[n];
          if constexpr (K == 12) {
            const S h = gh.second;
            sum[5][l] += h;
            sum[6][l] += h * xhat;
            sum[7][l] += h * xhat * xhat;
            sum[8][l] += h * v[n];
            sum[9][l] += h * v[n] * xhat;
            sum[10][l] += h * v_residual[n];
            sum[11][l] += h * v_residual[n] * xhat;
          }
        }
      }
    });
  }
  sum_over_positions<S, K, L>(sum);
  const int rows = K == 12 && op.v_residual == nullptr ? 10 : K;
  store_sums<S, K, L>(gridDim.y == 1 ? op.sums : op.workspace, rows, walk.channel, op.channels, sum);
}

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kNormThreads, 1) batch_norm_act_bwd_bwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  NormWalk<N, kLast> walk(op);
  const NormChannels<S, L> c(op, walk.channel);
  ChannelValues<S, L> k[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    k[i] = per_channel<S, L>(static_cast<const S*>(op.k) + i * op.channels, walk.channel, op.channels, S(0));
  }
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset();
    const NormPoint<T, N, L> at(op, c, offset);
    const Vec<T, N> dy = load_at<T, N>(op.dy, offset), v = load_at<T, N>(op.v, offset);
    const Vec<T, N> v_residual = load_at<T, N>(op.v_residual, offset);
    Vec<T, N> a_x, a_dy, a_residual;
    with_activation(static_cast<Activation>(op.activation), [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S q = k[0][n] * v[n] + k[1][n] + k[2][n] * at.xhat[n] + v_residual[n];
        S g, a_q, a_z(0);
        if constexpr (is_smooth(A)) {
          const Curve<S> curve = act_curve<A>(at.z[n]);
          g = dy[n] * curve.first, a_q = q * curve.first, a_z = dy[n] * curve.second * q;
        } else {
          g = act_bwd<A>(dy[n], at.z[n], c.slope[n]), a_q = act_bwd<A>(q, at.z[n], c.slope[n]);
          if constexpr (A == Activation::prelu) {
            a_q += k[3][n] * negative_part(at.z[n]);
            a_z = k[3][n] * where_positive(at.z[n], S(0), dy[n]);
          }
        }
        a_dy.set(n, a_q);
        a_x.set(n, k[4][n] * v[n] + k[5][n] * g + k[6][n] * a_z + k[7][n] + k[8][n] * at.xhat[n]);
        a_residual.set(n, a_z);
      }
    });
    store_at(op.a_x, offset, a_x);
    store_at(op.a_dy, offset, a_dy);
    if (op.a_residual != nullptr) store_at(op.a_residual, offset, a_residual);
  }
}

}  // namespace fuseblock
