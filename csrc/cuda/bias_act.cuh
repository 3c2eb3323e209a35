// bias_act kernels: bias, activation, gain and clamp, and its derivatives; equations in bias_act.h's reference.
//
//   forward       a thread does 8 neighbouring elements: one byte of each plane of the mask
//   derivatives   N neighbouring elements of one channel, or (kLast) always of the same N channels, one after the other;
//                 sums of a channel: thread, block (shared memory), blocks (a second kernel), in a fixed order
//
// Bytes an element, b of T: forward 2b and the bits; backward 2b and the bits, or 3b from x; second order the same, or 5b.
// Accesses are 16 bytes where channels, pixels and addresses allow it. The activation is a branch that all threads take alike.
#pragma once

#include "cuda/bias_act.h"
#include "cuda/vector.h"
#include "math/bias_act.h"

namespace fuseblock {

inline constexpr int kBiasActThreads = 256;
// Blocks of a multiprocessor that must fit: ptxas aims at more by itself, and spills.
inline constexpr int kBiasActBlocks = 2;

// Threads of a block: along channels, along positions.
template <bool kLast>
inline constexpr int kChannelThreads = kLast ? 32 : 1;

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

template <class S>
FB_HD S value_of(const void* data, int64_t channel) {
  return data == nullptr ? S(0) : static_cast<const S*>(data)[channel];
}

template <class T, int N>
FB_HD Vec<T, N> load_elements(const void* data, int64_t offset) {
  return *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(data) + offset);
}

template <class T, int N>
FB_HD void store_elements(void* data, int64_t offset, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(data) + offset) = x;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kBiasActThreads) bias_act_fwd_kernel(const BiasAct op) {
  using S = State<T>;
  constexpr int N = 8;
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, first = byte * N;
  if (first >= op.count) return;
  const BiasActMath<S> math(op);
  const int here = op.count - first < N ? static_cast<int>(op.count - first) : N;
  const bool whole = kWide && here == N;
  Vec<T, N> x;
  if (whole) {
    x = load_elements<T, N>(op.x, first);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < here) x.element[n] = static_cast<const T*>(op.x)[first + n];
      else x.set(n, S(0));
    }
  }
  const int64_t row = first / op.inner;
  int64_t channel = row % op.channels, left = (row + 1) * op.inner - first;
  unsigned passes = 0, positive = 0;
  Vec<T, N> y;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const S z = x[n] + value_of<S>(op.bias, channel);
    const S slope = math.activation == Activation::prelu ? value_of<S>(op.slope, channel) : math.slope;
    S value = 0;
    with_activation(math.activation, [&](auto tag) { value = act<decltype(tag)::value>(z, slope); });
    value *= math.gain;
    y.set(n, math.limited(value));
    const unsigned bit = (n < here ? 1u : 0u) << n;
    if (math.inside(value) && !(math.activation == Activation::relu && z <= 0)) passes |= bit;
    if (z > 0) positive |= bit;
    if (--left == 0) {
      left = op.inner;
      if (++channel == op.channels) channel = 0;
    }
  }
  if (whole) {
    store_elements<T, N>(op.out, first, y);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < here) static_cast<T*>(op.out)[first + n] = y.element[n];
    }
  }
  if (op.new_mask != nullptr) {
    op.new_mask[byte] = static_cast<uint8_t>(math.kind == MaskKind::gate ? passes : positive);
    if (math.kind == MaskKind::sign_gate) op.new_mask[(op.count + 7) / 8 + byte] = static_cast<uint8_t>(passes);
  }
}

// The elements that a thread of the derivatives visits.
template <int N, bool kLast>
struct BiasActWalk {
  int64_t channels, inner, channel, at, end, step, per_image;

  __device__ explicit BiasActWalk(const BiasAct& op) : channels(op.channels), inner(op.inner) {
    at = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
    step = static_cast<int64_t>(gridDim.y) * blockDim.y;
    per_image = kLast ? 1 : inner / N;
    channel = kLast ? (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N : blockIdx.x;
    end = channel < channels ? op.count / (channels * inner) * per_image : 0;
  }
  __device__ bool inside() const { return at < end; }
  __device__ int64_t offset() const {
    if constexpr (kLast) return at * channels + channel;
    return (at / per_image * channels + channel) * inner + at % per_image * N;
  }
};

// Adds `value` of the threads of a block that share channels, and writes the block's sum to row blockIdx.y of `partials`.
template <class S, int L>
__device__ void write_partials(const S (&value)[L], S* partials, int64_t channel, int64_t channels) {
  FB_SHARED(S, buffer, [kBiasActThreads]);
  const int width = blockDim.x, place = threadIdx.y * width + threadIdx.x;
  for (int n = 0; n < L; ++n) {
    buffer[place] = value[n];
    __syncthreads();
    for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
      if (static_cast<int>(threadIdx.y) < rows) buffer[place] += buffer[place + rows * width];
      __syncthreads();
    }
    if (threadIdx.y == 0 && channel + n < channels) partials[blockIdx.y * channels + channel + n] = buffer[place];
    __syncthreads();
  }
}

// N neighbouring bits of a plane; N divides 8 or is 1, and the offset is a multiple of N.
FB_HD unsigned bits_at(const uint8_t* plane, int64_t offset) { return static_cast<unsigned>(plane[offset >> 3]) >> (offset & 7); }

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks) bias_act_bwd_kernel(const BiasAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  const BiasActMath<S> math(op);
  const int64_t plane = (op.count + 7) / 8;
  BiasActWalk<N, kLast> walk(op);
  S dz_sum[L] = {}, slope_sum[L] = {};
  for (; walk.inside(); walk.at += walk.step) {
    const int64_t offset = walk.offset();
    const Vec<T, N> dy = load_elements<T, N>(op.dy, offset);
    Vec<T, N> dx;
    if (op.x == nullptr) {
      const unsigned first = math.kind == MaskKind::none ? 0u : bits_at(op.mask, offset);
      const unsigned second = math.kind == MaskKind::sign_gate ? bits_at(op.mask + plane, offset) : 0u;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S dz = math.through_mask(dy[n], first >> n & 1, second >> n & 1);
        dx.set(n, dz);
        dz_sum[kLast ? n : 0] += dz;
      }
    } else {
      const Vec<T, N> x = load_elements<T, N>(op.x, offset);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t channel = walk.channel + (kLast ? n : 0);
        const S z = x[n] + value_of<S>(op.bias, channel), slope = value_of<S>(op.slope, channel);
        S dz = 0;
        with_activation(math.activation, [&](auto tag) {
          constexpr Activation A = decltype(tag)::value;
          const S g = math.inside(act<A>(z, slope) * math.gain) ? dy[n] * math.gain : S(0);
          dz = act_bwd<A>(g, z, slope);
          if constexpr (A == Activation::prelu) slope_sum[kLast ? n : 0] += g * negative_part(z);
        });
        dx.set(n, dz);
        dz_sum[kLast ? n : 0] += dz;
      }
    }
    store_elements<T, N>(op.out, offset, dx);
  }
  if (op.partials == nullptr) return;
  S* const partials = static_cast<S*>(op.partials);
  write_partials<S, L>(dz_sum, partials, walk.channel, op.channels);
  if (math.activation == Activation::prelu) {
    write_partials<S, L>(slope_sum, partials + gridDim.y * op.channels, walk.channel, op.channels);
  }
}

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks) bias_act_bwd_bwd_kernel(const BiasAct op) {
  using S = State<T>;
  constexpr int L = kLast ? N : 1;
  const BiasActMath<S> math(op);
  const int64_t plane = (op.count + 7) / 8;
  BiasActWalk<N, kLast> walk(op);
  S a_z_sum[L] = {}, slope_sum[L] = {};
  for (; walk.inside(); walk.at += walk.step) {
    const int64_t offset = walk.offset();
    const Vec<T, N> v = load_elements<T, N>(op.v, offset);
    Vec<T, N> a_dy;
    if (op.x == nullptr) {
      const unsigned first = math.kind == MaskKind::none ? 0u : bits_at(op.mask, offset);
      const unsigned second = math.kind == MaskKind::sign_gate ? bits_at(op.mask + plane, offset) : 0u;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S q = v[n] + value_of<S>(op.v_bias, walk.channel + (kLast ? n : 0));
        a_dy.set(n, math.through_mask(q, first >> n & 1, second >> n & 1));
      }
    } else {
      const Vec<T, N> x = load_elements<T, N>(op.x, offset), dy = load_elements<T, N>(op.dy, offset);
      Vec<T, N> a_x;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t channel = walk.channel + (kLast ? n : 0);
        const S z = x[n] + value_of<S>(op.bias, channel), slope = value_of<S>(op.slope, channel);
        S a_z = 0, a_g = 0;
        with_activation(math.activation, [&](auto tag) {
          constexpr Activation A = decltype(tag)::value;
          const S factor = math.inside(act<A>(z, slope) * math.gain) ? math.gain : S(0);
          const S q = v[n] + value_of<S>(op.v_bias, channel), g = dy[n] * factor;
          if constexpr (A == Activation::prelu) {
            const S v_slope = value_of<S>(op.v_slope, channel);
            a_g = factor * (act_bwd<A>(q, z, slope) + v_slope * negative_part(z));
            a_z = where_positive(z, S(0), g * v_slope);
            slope_sum[kLast ? n : 0] += where_positive(z, S(0), g * q);
          } else if constexpr (is_smooth(A)) {
            const Curve<S> curve = act_curve<A>(z);
            a_g = factor * q * curve.first;
            a_z = q * g * curve.second;
          }
        });
        a_dy.set(n, a_g);
        a_x.set(n, a_z);
        a_z_sum[kLast ? n : 0] += a_z;
      }
      store_elements<T, N>(op.a_x, offset, a_x);
    }
    store_elements<T, N>(op.out, offset, a_dy);
  }
  if (op.partials == nullptr) return;
  S* const partials = static_cast<S*>(op.partials);
  write_partials<S, L>(a_z_sum, partials, walk.channel, op.channels);
  if (math.activation == Activation::prelu) {
    write_partials<S, L>(slope_sum, partials + gridDim.y * op.channels, walk.channel, op.channels);
  }
}

// The sum over the splits of partials[k][split][channel]; blockIdx.y: k, of sums (0) or slope_sums.
template <class S>
__global__ void __launch_bounds__(kBiasActThreads) bias_act_sum_kernel(const BiasAct op, int64_t splits) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= op.channels) return;
  const S* const from = static_cast<const S*>(op.partials) + blockIdx.y * splits * op.channels + channel;
  S total = 0;
  for (int64_t split = 0; split < splits; ++split) total += from[split * op.channels];
  void* const to = blockIdx.y == 0 ? op.sums : op.slope_sums;
  if (to != nullptr) static_cast<S*>(to)[channel] = total;
}

}  // namespace fuseblock
