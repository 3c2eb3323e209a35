// The second order of batch_norm_act: equations in batch_norm_act.cuh.
#pragma once

#include "cuda/batch_norm_act.cuh"

namespace fuseblock {

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
template <class T, int N, int L, int K>
__global__ void __launch_bounds__(kChannelThreads, 2) batch_norm_act_bwd_bwd_reduce_kernel(const BatchNormAct op, int rows) {
  using S = State<T>;
  using A = Activation;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
  S sum[K * L] = {};
  for (; walk.inside(); walk.next()) {
    const Vec<T, N> x = walk.template load<T>(op.x), residual = walk.template load<T>(op.residual);
    const Vec<T, N> dy = walk.template load<T>(op.dy), v = walk.template load<T>(op.v);
    const Vec<T, N> v_residual = K == 12 ? walk.template load<T>(op.v_residual) : zeros<T, N>();
    const NormPoint<T, N, L> at(op, c, x, residual, walk.bits(op.mask));
    const auto add = [&](auto tag) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S xhat = at.xhat[n];
        const Curve<S> gh = second_factors<decltype(tag)::value>(dy[n], at.z[n], c.slope[n]);
        const S g = gh.first;
        S* const to = sum + n % L;
        to[0] += v[n];
        to[L] += v[n] * xhat;
        to[2 * L] += g;
        to[3 * L] += g * xhat;
        to[4 * L] += g * v[n];
        if constexpr (K == 12) {
          const S h = gh.second;
          to[5 * L] += h;
          to[6 * L] += h * xhat;
          to[7 * L] += h * xhat * xhat;
          to[8 * L] += h * v[n];
          to[9 * L] += h * v[n] * xhat;
          to[10 * L] += h * v_residual[n];
          to[11 * L] += h * v_residual[n] * xhat;
        }
      }
    };
    const auto activation = static_cast<A>(op.activation);
    if constexpr (K == 5) with_one_of<A::relu, A::leaky_relu>(activation, add);
    else with_one_of<A::prelu, A::silu, A::tanh, A::elu>(activation, add);
  }
  finish_sums<K, L>(op, rows, walk.has_channels, walk.operand, sum);
}

template <class T, int N, int L>
__global__ void __launch_bounds__(kChannelThreads, 2) batch_norm_act_bwd_bwd_kernel(const BatchNormAct op) {
  using S = State<T>;
  ChannelWalk<N, L> walk(op, blockIdx.x, blockIdx.y);
  const NormChannels<S, L> c(op, walk.operand, walk.has_channels);
  const S* const coefficients = static_cast<const S*>(op.k);
  // Registers are scarce: k3 and slopes of channels are prelu's alone, which loads them where it needs them.
  ChannelValues<S, L> k[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    if (i != 3) k[i] = per_channel<S, L>(coefficients + i * operands(op), walk.operand, walk.has_channels, S(0));
  }
  for (; walk.inside(); walk.next()) {
    const Vec<T, N> x = walk.template load<T>(op.x), residual = walk.template load<T>(op.residual);
    const Vec<T, N> dy = walk.template load<T>(op.dy), v = walk.template load<T>(op.v);
    const Vec<T, N> v_residual = walk.template load<T>(op.v_residual);
    const NormPoint<T, N, L> at(op, c, x, residual, walk.bits(op.mask));
    Vec<T, N> a_x, a_dy, a_residual;
    with_activation_or_prelu_of(op, [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const S slope = A == Activation::prelu ? static_cast<const S*>(op.slope)[(walk.operand + n % L) * op.slope_stride]
                                               : static_cast<S>(op.negative_slope);
        const S q = k[0][n] * v[n] + k[1][n] + k[2][n] * at.xhat[n] + v_residual[n];
        S g, a_q, a_z(0);
        if constexpr (is_smooth(A)) {
          const Curve<S> curve = act_curve<A>(at.z[n]);
          g = dy[n] * curve.first, a_q = q * curve.first, a_z = dy[n] * curve.second * q;
        } else {
          g = act_bwd<A>(dy[n], at.z[n], slope), a_q = act_bwd<A>(q, at.z[n], slope);
          if constexpr (A == Activation::prelu) {
            const S k3 = coefficients[3 * operands(op) + walk.operand + n % L];
            a_q += k3 * negative_part(at.z[n]);
            a_z = k3 * where_positive(at.z[n], S(0), dy[n]);
          }
        }
        a_dy.set(n, a_q);
        a_x.set(n, k[4][n] * v[n] + k[5][n] * g + k[6][n] * a_z + k[7][n] + k[8][n] * at.xhat[n]);
        a_residual.set(n, a_z);
      }
    });
    walk.store(op.a_x, a_x);
    walk.store(op.a_dy, a_dy);
    if (op.a_residual != nullptr) walk.store(op.a_residual, a_residual);
  }
}

}  // namespace fuseblock
