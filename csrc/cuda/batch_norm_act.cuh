// Batch normalisation, activation and optional residual: z = w xhat + b + r, xhat = (x - mean) invstd, y = act(z).
//
//   backward      G = dy act'(z): sums of G, G xhat, prelu: dy min(z, 0);   dx = k0 G + k1 + k2 xhat, dr = G
//   second order  V, v_r cotangents of dx, dr; h = dy act''(z) (prelu: dy [z <= 0]): sums of V, V xhat, G, G xhat, G V, and
//                 unless act is piecewise with fixed slopes of h, h xhat, h xhat^2, h V, h V xhat, h v_r, h v_r xhat;
//                 q = k0 V + k1 + k2 xhat + v_r, a_dy = q act'(z) + k3 min(z, 0), a_z = a_r = h q (prelu: k3 h, others 0),
//                 a_x = k4 V + k5 G + k6 a_z + k7 + k8 xhat
//
// Passes over the tensor: statistics 1, forward 2, backward 2 and 3, second order 3 and 5, one more each with a residual
// or v_r; a mask is an eighth of a byte an element. Where a channel fits into shared memory statistics and forward take 2,
// backward 3 (batch_norm_act_resident.cuh). Accesses are 16 bytes where rows are aligned. Sums are added in a fixed order:
// thread, block, blocks. Statistics by Chan, Golub, LeVeque 1979. Here: first order; batch_norm_act_second.cuh: second.
#pragma once

#include "cuda/batch_norm_act_point.cuh"

namespace fuseblock {

// Writes this block's share (rows, operands) of a reduction: the first `rows` of the values (K, L) of thread y = 0.
template <int K, int L, class S>
__device__ void store_share(const BatchNormAct& op, int rows, int64_t operand, const S* value) {
  S* const share = static_cast<S*>(op.workspace) + blockIdx.y * rows * operands(op);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (k < rows) share[k * operands(op) + operand + l] = value[k * L + l];
    }
  }
}

// What a block does with its sums: the results if it is alone, else its share of them.
template <int K, int L, class S>
__device__ void finish_sums(const BatchNormAct& op, int rows, const bool inside, int64_t operand, S (&sum)[K * L]) {
  merge_threads<AddSums>(sum, blockDim.y);
  if (threadIdx.y != 0 || !inside) return;
  if (gridDim.y > 1) return store_share<K, L>(op, rows, operand, sum);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (k < rows) write_sum(op, k, operand + l, sum[k * L + l]);
    }
  }
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 1) batch_norm_act_stats_kernel(const BatchNormAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  S own[2 * L + 1] = {};
  for (; walk.inside(); walk.next()) {
    const Vec<T, N> x = load_at<T, N>(op.x, walk.offset);
    S few[2 * L + 1] = {};  // the moments of this visit
    few[0] = S(N / L);
#pragma unroll
    for (int n = 0; n < N; ++n) few[1 + n % L] += x[n] * (S(L) / S(N));
    if constexpr (L != N) {
#pragma unroll
      for (int n = 0; n < N; ++n) few[2] += (x[n] - few[1]) * (x[n] - few[1]);
    }
    MergeMoments<L>()(own, few);
  }
  merge_threads<MergeMoments<L>>(own, blockDim.y);
  if (threadIdx.y != 0 || !walk.has_channels) return;
  if (gridDim.y > 1) {
    store_share<2, L>(op, 3, walk.operand, own + 1);
    S* const counts = static_cast<S*>(op.workspace) + (blockIdx.y * 3 + 2) * operands(op) + walk.operand;
#pragma unroll
    for (int l = 0; l < L; ++l) counts[l] = own[0];
    return;
  }
#pragma unroll
  for (int l = 0; l < L; ++l) write_statistics(op, walk.operand + l, own[1 + l], own[1 + L + l]);
}

// Combines the shares of all blocks: thread x a channel, y every eighth block. kValues: 3 moments, or 1 of the sums, of which
// blockIdx.y says which.
template <class S, int kValues>
__global__ void __launch_bounds__(kCombineWidth* kCombineHeight)
    batch_norm_act_combine_kernel(const BatchNormAct op, int splits) {
  using Merge = std::conditional_t<kValues == 3, MergeMoments<1>, AddSums>;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kCombineWidth + threadIdx.x, distance = operands(op);
  const int64_t rows = kValues * gridDim.y;
  const S* const share = static_cast<const S*>(op.workspace) + blockIdx.y * distance + channel;
  S own[kValues] = {};
  if (channel < distance) {
    for (int64_t split = threadIdx.y; split < splits; split += kCombineHeight) {
      S other[kValues];
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        // Moments lie as mean, sum of squares, number.
        other[kValues == 3 ? (k + 1) % 3 : k] = share[(split * rows + k) * distance];
      }
      Merge()(own, other);
    }
  }
  merge_threads<Merge>(own, kCombineHeight);
  if (threadIdx.y != 0 || channel >= distance) return;
  if constexpr (kValues == 3) write_statistics(op, channel, own[1], own[2]);
  else write_sum(op, static_cast<int>(blockIdx.y), channel, own[0]);
}

// The bit of z in a mask: the side that derivatives of relu and leaky_relu are on, of NaN as in PyTorch.
template <class S>
FB_HD bool counts_as_positive(const BatchNormAct& op, S z) {
  return op.activation == static_cast<int>(Activation::relu) ? !(z <= S(0)) : z > S(0);
}

// One visit of a forward pass. Only visits of a whole byte of the mask write it.
template <class T, int N, int L>
FB_HD void normalise(const BatchNormAct& op, const NormChannels<State<T>, L>& c, int64_t offset, const Vec<T, N>& x) {
  const NormPoint<T, N, L> at(op, c, offset, x);
  Vec<T, N> y;
  with_activation_of(op, [&](auto tag) {
#pragma unroll
    for (int n = 0; n < N; ++n) y.set(n, act<decltype(tag)::value>(at.z[n], c.slope[n]));
  });
  store_at(op.y, offset, y);
  if constexpr (N == kSpan) {
    if (op.new_mask == nullptr) return;
    unsigned bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) bits |= (counts_as_positive(op, at.z[n]) ? 1u : 0u) << n;
    op.new_mask[offset >> 3] = static_cast<uint8_t>(bits);
  }
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 1) batch_norm_act_fwd_kernel(const BatchNormAct op) {
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const NormChannels<State<T>, L> c(op, walk.operand, walk.has_channels);
  for (; walk.inside(); walk.next()) normalise<T, N, L>(op, c, walk.offset, load_at<T, N>(op.x, walk.offset));
}

// The same with a mask whose bytes span rows: a thread has eight neighbouring elements, whatever their channels.
template <class T>
__global__ void __launch_bounds__(kChannelThreads, 1) batch_norm_act_fwd_masked_kernel(const BatchNormAct op) {
  const int64_t total = op.samples * op.channels * op.size, run = op.channels_last ? 1 : op.size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x) * kSpan;
  if (first >= total) return;
  // Masks are for piecewise linear activations alone.
  const bool relu = op.activation == static_cast<int>(Activation::relu);
  unsigned bits = 0;
#pragma unroll 1
  for (int n = 0; n < kSpan && first + n < total; ++n) {
    const int64_t at = first + n;
    const NormChannels<State<T>, 1> c(op, at / run % op.channels, true);
    const NormPoint<T, 1, 1> point(op, c, at, load_at<T, 1>(op.x, at));
    Vec<T, 1> y;
    const State<T> z = point.z[0], slope = c.slope[0];
    y.set(0, relu ? act<Activation::relu>(z, slope) : act<Activation::leaky_relu>(z, slope));
    store_at(op.y, at, y);
    bits |= (counts_as_positive(op, z) ? 1u : 0u) << n;
  }
  op.new_mask[first >> 3] = static_cast<uint8_t>(bits);
}

// One visit of the sums of a backward pass: of G, G xhat and, for prelu, dy min(z, 0).
template <class T, int N, int L>
FB_HD void add_first_sums(const BatchNormAct& op, const NormChannels<State<T>, L>& c, int64_t offset, const Vec<T, N>& x,
                          const Vec<T, N>& dy, State<T> (&sum)[3 * L]) {
  using S = State<T>;
  const NormPoint<T, N, L> at(op, c, offset, x);
  with_activation_or_prelu_of(op, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const S g = act_bwd<A>(dy[n], at.z[n], c.slope[n]);
      sum[n % L] += g;
      sum[L + n % L] += g * at.xhat[n];
      if constexpr (A == Activation::prelu) sum[2 * L + n % L] += dy[n] * negative_part(at.z[n]);
    }
  });
}

// One visit of the results of a backward pass.
template <class T, int N, int L>
FB_HD void write_gradients(const BatchNormAct& op, const NormChannels<State<T>, L>& c,
                           const ChannelValues<State<T>, L> (&k)[3], int64_t offset, const Vec<T, N>& x,
                           const Vec<T, N>& dy) {
  using S = State<T>;
  const NormPoint<T, N, L> at(op, c, offset, x);
  Vec<T, N> dx, dresidual;
  with_activation_of(op, [&](auto tag) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const S g = act_bwd<decltype(tag)::value>(dy[n], at.z[n], c.slope[n]);
      dx.set(n, k[0][n] * g + k[1][n] + k[2][n] * at.xhat[n]);
      dresidual.set(n, g);
    }
  });
  store_at(op.dx, offset, dx);
  if (op.dresidual != nullptr) store_at(op.dresidual, offset, dresidual);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 1) batch_norm_act_bwd_reduce_kernel(const BatchNormAct op, int rows) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
  S sum[3 * L] = {};
  for (; walk.inside(); walk.next()) {
    const int64_t at = walk.offset;
    add_first_sums<T, N, L>(op, c, at, load_at<T, N>(op.x, at), load_at<T, N>(op.dy, at), sum);
  }
  finish_sums<3, L>(op, rows, walk.has_channels, walk.operand, sum);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 1) batch_norm_act_bwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
  ChannelValues<S, L> k[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    k[i] = per_channel<S, L>(static_cast<const S*>(op.k) + i * operands(op), walk.operand, walk.has_channels, S(0));
  }
  for (; walk.inside(); walk.next()) {
    const int64_t at = walk.offset;
    write_gradients<T, N, L>(op, c, k, at, load_at<T, N>(op.x, at), load_at<T, N>(op.dy, at));
  }
}

}  // namespace fuseblock
