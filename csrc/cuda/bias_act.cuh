// bias_act kernels: bias, activation, gain and clamp, and its derivatives; equations in bias_act.h's reference.
//
//   forward       8 neighbouring elements a visit: one byte of each plane of the mask
//   derivatives   16 bytes of neighbours; sums of a channel: thread, block, blocks (a second kernel), in a fixed order
//
// Bytes an element, b of T: forward 2b and the bits; backward 2b and the bits, or 3b from x; second order the same, or 5b.
// Accesses are 16 bytes where channels, pixels and addresses allow it, else of one element. The activation is a branch that
// all threads take alike.
#pragma once

#include "cuda/bias_act.h"
#include "cuda/channels.cuh"
#include "math/bias_act.h"

namespace fuseblock {

// Blocks of a multiprocessor that must fit: ptxas aims at more by itself, and spills. The second order has most values.
inline constexpr int kBiasActBlocks = 2, kBiasActSecondBlocks = 1;

FB_HD int64_t elements(const BiasAct& op) { return op.samples * op.channels * op.size; }
FB_HD int64_t plane_bytes(const BiasAct& op) { return (elements(op) + 7) / 8; }

template <class S>
struct BiasActMath {
  Activation activation;
  MaskKind kind;
  S slope, gain, low_gain, clamp;
  bool clamped;

  FB_HD explicit BiasActMath(const BiasAct& op)
      : activation(static_cast<Activation>(op.activation)), kind(mask_kind(activation, op.clamp)),
        slope(static_cast<S>(op.negative_slope)), gain(static_cast<S>(op.gain)),
        low_gain(static_cast<S>(op.gain * op.negative_slope)), clamp(static_cast<S>(op.clamp)),
        clamped(is_clamped(op.clamp)) {}

  // A NaN counts as inside where there is no clamp.
  FB_HD bool inside(S scaled) const { return !clamped || (scaled <= clamp && scaled >= -clamp); }
  FB_HD S limited(S scaled) const {
    return !clamped ? scaled : scaled > clamp ? clamp : scaled < -clamp ? -clamp : scaled;
  }
  // g times the derivative that the bits tell.
  FB_HD S through_mask(S g, bool first, bool second) const {
    if (kind == MaskKind::none) return g * gain;
    if (kind == MaskKind::gate) return first ? g * gain : S(0);
    const S dz = g * (first ? gain : low_gain);
    return kind == MaskKind::sign || second ? dz : S(0);
  }
};

// The parameters of a thread's channels; absent ones are zeros.
template <class S, int L>
struct BiasActChannels {
  ChannelValues<S, L> bias, slope;

  FB_HD BiasActChannels(const BiasAct& op, int64_t channel, bool inside)
      : bias(per_channel<S, L>(op.bias, channel, inside, S(0))), slope(per_channel<S, L>(op.slope, channel, inside, S(0))) {}
};

// One visit of a forward pass: y, and a byte of each plane of the mask where a visit is that long.
template <class T, int N, int L>
FB_HD Vec<T, N> bias_act_of(const BiasActMath<State<T>>& math, const BiasActChannels<State<T>, L>& c, const Vec<T, N>& x,
                            unsigned& passes, unsigned& positive) {
  using S = State<T>;
  using A = Activation;
  S z[N], value[N];
#pragma unroll
  for (int n = 0; n < N; ++n) z[n] = x[n] + c.bias[n];
  // identity and prelu are leaky_relu with slopes of their own.
  const A a = math.activation == A::identity || math.activation == A::prelu ? A::leaky_relu : math.activation;
  with_one_of<A::relu, A::leaky_relu, A::silu, A::tanh, A::elu>(a, [&](auto tag) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const S slope = math.activation == A::prelu ? c.slope[n] : math.activation == A::identity ? S(1) : math.slope;
      value[n] = act<decltype(tag)::value>(z[n], slope) * math.gain;
    }
  });
  Vec<T, N> y;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    y.set(n, math.limited(value[n]));
    if (math.inside(value[n]) && !(math.activation == A::relu && z[n] <= 0)) passes |= 1u << n;
    if (z[n] > 0) positive |= 1u << n;
  }
  return y;
}

template <class S>
FB_HD void store_masks(const BiasAct& op, const BiasActMath<S>& math, int64_t byte, unsigned passes, unsigned positive) {
  op.new_mask[byte] = static_cast<uint8_t>(math.kind == MaskKind::gate ? passes : positive);
  if (math.kind == MaskKind::sign_gate) op.new_mask[plane_bytes(op) + byte] = static_cast<uint8_t>(passes);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, kBiasActBlocks) bias_act_fwd_kernel(const BiasAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const BiasActMath<S> math(op);
  const BiasActChannels<S, L> c(op, walk.operand, walk.has_channels);
  for (; walk.inside(); walk.next()) {
    unsigned passes = 0, positive = 0;
    store_at(op.out, walk.offset, bias_act_of<T, N, L>(math, c, load_at<T, N>(op.x, walk.offset), passes, positive));
    if (N == kSpan && op.new_mask != nullptr) store_masks(op, math, walk.offset >> 3, passes, positive);
  }
}

// The same with masks whose bytes span rows: a thread has eight neighbouring elements, whatever their channels.
template <class T>
__global__ void __launch_bounds__(kChannelThreads, kBiasActBlocks) bias_act_fwd_masked_kernel(const BiasAct op) {
  using S = State<T>;
  const int64_t count = elements(op), byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (byte * kSpan >= count) return;
  const BiasActMath<S> math(op);
  unsigned passes = 0, positive = 0;
#pragma unroll 1
  for (int n = 0; n < kSpan && byte * kSpan + n < count; ++n) {
    const int64_t at = byte * kSpan + n, channel = at / (op.channels_last ? 1 : op.size) % op.channels;
    unsigned passes_here = 0, positive_here = 0;
    const BiasActChannels<S, 1> c(op, channel, true);
    store_at(op.out, at, bias_act_of<T, 1, 1>(math, c, load_at<T, 1>(op.x, at), passes_here, positive_here));
    passes |= passes_here << n, positive |= positive_here << n;
  }
  store_masks(op, math, byte, passes, positive);
}

// Writes a block's sums of dz or a_z, and of the slope's gradient, as row blockIdx.y of `partials`.
template <class S, int L>
__device__ void write_partials(const BiasAct& op, bool has_channels, int64_t channel, S (&sum)[2 * L]) {
  if (op.partials == nullptr) return;
  merge_threads<AddSums>(sum, blockDim.y);
  if (threadIdx.y != 0 || !has_channels) return;
  const int kinds = op.activation == static_cast<int>(Activation::prelu) ? 2 : 1;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    S* const row = static_cast<S*>(op.partials) + (static_cast<int64_t>(k) * gridDim.y + blockIdx.y) * op.channels + channel;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (k < kinds) row[l] = sum[k * L + l];
    }
  }
}

// g through the masks, one visit; `add` gets what comes out.
template <class T, int N, class Add>
FB_HD Vec<T, N> through_masks(const BiasAct& op, const BiasActMath<State<T>>& math, int64_t offset, const State<T> (&g)[N],
                              Add add) {
  const unsigned first = math.kind == MaskKind::none ? 0u : bits_at(op.mask, offset);
  const unsigned second = math.kind == MaskKind::sign_gate ? bits_at(op.mask + plane_bytes(op), offset) : 0u;
  Vec<T, N> out;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const State<T> value = math.through_mask(g[n], first >> n & 1, second >> n & 1);
    out.set(n, value);
    add(n, value);
  }
  return out;
}

// Calls f with the tag of an activation that keeps x.
template <class F>
FB_HD void with_kept(Activation a, F&& f) {
  with_one_of<Activation::prelu, Activation::silu, Activation::tanh, Activation::elu>(a, f);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, kBiasActBlocks) bias_act_bwd_kernel(const BiasAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const BiasActMath<S> math(op);
  const BiasActChannels<S, L> c(op, walk.operand, walk.has_channels);
  S sum[2 * L] = {};
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset;
    const Vec<T, N> dy = load_at<T, N>(op.dy, offset);
    Vec<T, N> dx;
    if (op.x == nullptr) {
      S g[N];
#pragma unroll
      for (int n = 0; n < N; ++n) g[n] = dy[n];
      dx = through_masks<T, N>(op, math, offset, g, [&](int n, S dz) { sum[n % L] += dz; });
    } else {
      const Vec<T, N> x = load_at<T, N>(op.x, offset);
      with_kept(math.activation, [&](auto tag) {
        constexpr Activation A = decltype(tag)::value;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const S z = x[n] + c.bias[n], slope = c.slope[n];
          const S g = math.inside(act<A>(z, slope) * math.gain) ? dy[n] * math.gain : S(0), dz = act_bwd<A>(g, z, slope);
          if constexpr (A == Activation::prelu) sum[L + n % L] += g * negative_part(z);
          dx.set(n, dz);
          sum[n % L] += dz;
        }
      });
    }
    store_at(op.out, offset, dx);
  }
  write_partials<S, L>(op, walk.has_channels, walk.operand, sum);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, kBiasActSecondBlocks) bias_act_bwd_bwd_kernel(const BiasAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const BiasActMath<S> math(op);
  const BiasActChannels<S, L> c(op, walk.operand, walk.has_channels);
  const auto v_bias = per_channel<S, L>(op.v_bias, walk.operand, walk.has_channels, S(0));
  const auto v_slope = per_channel<S, L>(op.v_slope, walk.operand, walk.has_channels, S(0));
  S sum[2 * L] = {};
  for (; walk.inside(); walk.next()) {
    const int64_t offset = walk.offset;
    const Vec<T, N> v = load_at<T, N>(op.v, offset);
    S q[N];
#pragma unroll
    for (int n = 0; n < N; ++n) q[n] = v[n] + v_bias[n];
    Vec<T, N> a_dy;
    if (op.x == nullptr) {
      a_dy = through_masks<T, N>(op, math, offset, q, [](int, S) {});
    } else {
      const Vec<T, N> x = load_at<T, N>(op.x, offset), dy = load_at<T, N>(op.dy, offset);
      Vec<T, N> a_x;
      with_kept(math.activation, [&](auto tag) {
        constexpr Activation A = decltype(tag)::value;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const S z = x[n] + c.bias[n], slope = c.slope[n];
          const S factor = math.inside(act<A>(z, slope) * math.gain) ? math.gain : S(0), g = dy[n] * factor;
          S a_z, a_g;
          if constexpr (A == Activation::prelu) {
            a_g = factor * (act_bwd<A>(q[n], z, slope) + v_slope[n] * negative_part(z));
            a_z = where_positive(z, S(0), g * v_slope[n]);
            sum[L + n % L] += where_positive(z, S(0), g * q[n]);
          } else {
            const Curve<S> curve = act_curve<A>(z);
            a_g = factor * q[n] * curve.first;
            a_z = q[n] * g * curve.second;
          }
          a_dy.set(n, a_g);
          a_x.set(n, a_z);
          sum[n % L] += a_z;
        }
      });
      store_at(op.a_x, offset, a_x);
    }
    store_at(op.out, offset, a_dy);
  }
  write_partials<S, L>(op, walk.has_channels, walk.operand, sum);
}

// The sum over the splits of partials[k][split][channel]; thread x a channel, y every eighth split; blockIdx.y: k, of sums (0)
// or slope_sums.
template <class S>
__global__ void __launch_bounds__(kCombineWidth* kCombineHeight) bias_act_sum_kernel(const BiasAct op, int64_t splits) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kCombineWidth + threadIdx.x;
  const S* const from = static_cast<const S*>(op.partials) + blockIdx.y * splits * op.channels + channel;
  S total[1] = {};
  if (channel < op.channels) {
    for (int64_t split = threadIdx.y; split < splits; split += kCombineHeight) total[0] += from[split * op.channels];
  }
  merge_threads<AddSums>(total, kCombineHeight);
  void* const to = blockIdx.y == 0 ? op.sums : op.slope_sums;
  if (threadIdx.y == 0 && channel < op.channels && to != nullptr) static_cast<S*>(to)[channel] = total[0];
}

}  // namespace fuseblock
