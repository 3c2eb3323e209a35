// What the kernels of batch_norm_act share: the values of a channel, what is computed of an element, moments, and the forms
// in which sums are written.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/channels.cuh"

namespace fuseblock {

FB_HD int64_t operands(const BatchNormAct& op) { return op.channels_last ? op.samples * op.channels : op.channels; }

// Values behind the statistics of a channel.
FB_HD int64_t values(const BatchNormAct& op) { return op.channels_last ? op.size : op.samples * op.size; }

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

// xhat and z of N elements; with a mask, z is only as positive or negative as its bit of `bits` says.
template <class T, int N, int L>
struct NormPoint {
  using S = State<T>;
  S xhat[N], z[N];

  FB_HD NormPoint(const BatchNormAct& op, const NormChannels<S, L>& c, const Vec<T, N>& x, const Vec<T, N>& residual,
                  unsigned bits) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      xhat[n] = (x[n] - c.mean[n]) * c.invstd[n];
      z[n] = c.weight[n] * xhat[n] + c.bias[n] + residual[n];
      if (op.mask != nullptr) z[n] = (bits >> n & 1) != 0 ? S(1) : S(-1);
    }
  }
  FB_HD NormPoint(const BatchNormAct& op, const NormChannels<S, L>& c, int64_t offset, const Vec<T, N>& x)
      : NormPoint(op, c, x, load_at<T, N>(op.residual, offset), op.mask == nullptr ? 0u : bits_at(op.mask, offset)) {}
};

// Calls f with the tag of op's activation. Launchers pass identity as leaky_relu with slope 1, and prelu is a leaky_relu but
// for its slopes' derivatives.
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
