// Arguments of the batch_norm_act CPU kernels. Equations: python/fuseblock/launch/batch_norm_act.py.
//
//   z = w xhat + b + r, xhat = (x - mean) s, G = dy act'(z), h = dy act''(z) (prelu: dy [z <= 0])
//   forward         stats: mean, squared deviations;                 y = act(z)
//   backward        sums of G, G xhat, dy min(z, 0);                 dx = k0 G + k1 + k2 xhat, dresidual = G
//   second order    sums of V, V xhat, G, G xhat, G V | h, h xhat, h xhat^2, h V, h V xhat | h v_r, h v_r xhat;
//                   q = k0 V + k1 + k2 xhat + v_r, a_dy = q act'(z) + k3 min(z, 0), a_z = h q (prelu: k3 h),
//                   a_x = k4 V + k5 G + k6 a_z + k7 + k8 xhat
#pragma once

#include "../math/pointwise.h"
#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

enum class NormSums { none, stats, backward, second_order };
enum class NormResult { none, forward, backward, second_order };

constexpr int64_t kMostNormSums = 12, kNormCoefficients = 9;

// What of one channel the kernels read, in the type of arithmetic: rows of NormCall::operands.
enum NormOperand { kMean, kInvstd, kWeight, kBias, kSlope, kFirstCoefficient, kNormOperands = kFirstCoefficient + kNormCoefficients };

struct NormCall {
  DType dtype;
  Activation activation;
  // Rows: x is (N, C, S) with the channels' stride S. Channels last: (N, C), S is 1.
  bool channels_last;
  int64_t N, C, S;
  // Instance norm: tensors are this many of those, one behind the other, each with statistics and operands of its own.
  // They have no masks, whose bytes would span samples.
  int64_t samples = 1;
  // Absent tensors are null; v, v_r and residual then count as zeros. With a mask, its bits take the place of z's sign.
  const void *x, *dy, *v, *v_r, *residual;
  const uint8_t* mask;
  void *result, *result2, *result3;  // y | dx, dresidual | a_x, a_dy, a_residual
  uint8_t* mask_result;
};

// A call as the kernels see it: channels-last tensors of few channels are seen as fewer rows of several times as many.
struct NormView : NormCall {
  int64_t width;   // channels of the view
  int64_t padded;  // width, rounded up to whole vectors: the distance of operands' rows
  void* operands;  // (kNormOperands, padded) in the type of arithmetic; zeros behind the width
};

// Elements [begin, end) of a channel (rows), or rows [begin, end) of all channels (channels last).
struct NormSlice {
  int64_t channel, begin, end;
};

// The kernels of one instruction set. `sums` is (k) for rows, (k, padded) for channels last: sums are added to it; stats
// leaves mean and sum of squared deviations there.
struct NormKernels {
  int vector_bytes;
  void (*sum)(const NormView&, NormSums, const NormSlice&, double* sums);
  void (*apply)(const NormView&, NormResult, const NormSlice&);
  // Rows [begin, end) of N * C; begin is a multiple of 8.
  void (*apply_with_mask)(const NormView&, int64_t begin, int64_t end);
};

// What a channel's operands are. The channels of sample n come behind those of the samples before it: n C + c.
struct NormChannel {
  // Sets them all (kNormOperands, given as zeros): without sums (null) what these and results without sums need, and then
  // from the sums (stats: mean and squared deviations) what results need. Channels are done in any order, by any thread.
  void (*operands)(void* context, int64_t channel, const double* sums, double* operands);
  void* context;
  int64_t first = 0;  // channel 0 of this call
};

// Sums, then results; either may be none. Statistics need no operands.
void batch_norm_act(const NormCall&, NormSums, int64_t sums, NormResult, const NormChannel&, const Threads&);

// k (9) and the adjoints of weight, bias and slope of one channel from its sums (12, zeros for those not taken).
struct NormAdjoints {
  double k[kNormCoefficients], weight, bias, slope;
};
NormAdjoints second_order_of_channel(const double* sums, double v_w, double v_b, double v_a, double w, double s,
                                     double count, bool smooth, bool training);

}  // namespace fuseblock::cpu
