// Launchers of batch_norm_act's kernels that take a pass over the tensor each, and of those that take all at once where a
// channel does not fit into shared memory.
#include "cuda/batch_norm_act.cuh"

#include "cuda/batch_norm_act_launch.h"
#include "cuda/batch_norm_act_resident.h"
#include "cuda/batch_norm_act_second.cuh"

namespace fuseblock {
namespace {

bool is_prelu(const BatchNormAct& op) { return op.activation == static_cast<int>(Activation::prelu); }
bool is_prelu_or_smooth(const BatchNormAct& op) { return op.activation >= static_cast<int>(Activation::prelu); }
int first_sums(const BatchNormAct& op) { return is_prelu(op) ? 3 : 2; }

// Second-order kernels keep up to twelve sums or fourteen coefficients of a channel in registers: of four channels at most.
template <class T>
constexpr int kSecondChannels = std::min(kChannelWidth<T>, 4);

template <class S, int kValues>
cudaError_t combine(const BatchNormAct& op, int64_t splits, int rows, void* stream) {
  if (splits > 1) {
    const dim3 blocks(static_cast<unsigned>(divide_up(operands(op), kCombineWidth)), static_cast<unsigned>(rows));
    const dim3 threads(kCombineWidth, kCombineHeight);
    const int count = static_cast<int>(splits);
    FB_LAUNCH((batch_norm_act_combine_kernel<S, kValues>), blocks, threads, 0, stream, op, count);
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t stats(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  FB_LAUNCH_CHANNELS(batch_norm_act_stats_kernel, T, kChannelWidth<T>, kChannelWidth<T>, splits, ());
  return combine<State<T>, 3>(op, splits, 1, stream);
}

template <class T>
cudaError_t fwd(const BatchNormAct& op, void* stream) {
  constexpr int width = kChannelWidth<T> == 1 ? 1 : kSpan;
  if (op.new_mask == nullptr || can_vectorise<T, width>(op)) {
    FB_LAUNCH_CHANNELS(batch_norm_act_fwd_kernel, T, width, width, 0, ());
    return cudaGetLastError();
  }
  const int64_t blocks = divide_up(op.samples * op.channels * op.size, kSpan * kChannelThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  FB_LAUNCH((batch_norm_act_fwd_masked_kernel<T>), grid, dim3(kChannelThreads), 0, stream, op);
  return cudaGetLastError();
}

template <class T>
cudaError_t bwd_reduce(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  const int rows = first_sums(op);
  FB_LAUNCH_CHANNELS(batch_norm_act_bwd_reduce_kernel, T, kChannelWidth<T>, kChannelWidth<T>, splits, (, rows));
  return combine<State<T>, 1>(op, splits, rows, stream);
}

template <class T>
cudaError_t bwd(const BatchNormAct& op, void* stream) {
  FB_LAUNCH_CHANNELS(batch_norm_act_bwd_kernel, T, kChannelWidth<T>, kChannelWidth<T>, 0, ());
  return cudaGetLastError();
}

template <class T>
cudaError_t bwd_bwd_reduce(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  constexpr int width = kChannelWidth<T>, channels = kSecondChannels<T>;
  const int rows = !is_prelu_or_smooth(op) ? 5 : op.v_residual == nullptr ? 10 : 12;
  if (rows == 5) {
    FB_LAUNCH_CHANNELS(batch_norm_act_bwd_bwd_reduce_kernel, T, width, channels, splits, (, rows), 5);
  } else {
    FB_LAUNCH_CHANNELS(batch_norm_act_bwd_bwd_reduce_kernel, T, width, channels, splits, (, rows), 12);
  }
  return combine<State<T>, 1>(op, splits, rows, stream);
}

template <class T>
cudaError_t bwd_bwd(const BatchNormAct& op, void* stream) {
  FB_LAUNCH_CHANNELS(batch_norm_act_bwd_bwd_kernel, T, kChannelWidth<T>, kSecondChannels<T>, 0, ());
  return cudaGetLastError();
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int64_t batch_norm_act_splits(const BatchNormAct* op) { return reduction_splits(*op); }

int launch_batch_norm_act_stats(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return stats<T>(o, stream); });
}

int launch_batch_norm_act_fwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return fwd<T>(o, stream); });
}

int launch_batch_norm_act_bwd_reduce(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return bwd_reduce<T>(o, stream); });
}

int launch_batch_norm_act_bwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return bwd<T>(o, stream); });
}

int launch_batch_norm_act_bwd_bwd_reduce(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return bwd_bwd_reduce<T>(o, stream); });
}

int launch_batch_norm_act_bwd_bwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(const BatchNormAct& o) { return bwd_bwd<T>(o, stream); });
}

int launch_batch_norm_act_whole_fwd(const BatchNormAct* op, int dtype, const DeviceLimits* device, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(BatchNormAct o) {
    cudaError_t error = cudaSuccess;
    if (resident_fwd<T>(o, *device, stream, error)) return error;
    if ((error = stats<T>(o, stream)) != cudaSuccess) return error;
    o.mean = o.new_mean, o.invstd = o.new_invstd;
    return fwd<T>(o, stream);
  });
}

int launch_batch_norm_act_whole_bwd(const BatchNormAct* op, int dtype, const DeviceLimits* device, void* stream) {
  return dispatch_norm(*op, dtype, [&]<class T>(BatchNormAct o) {
    cudaError_t error = cudaSuccess;
    if (resident_bwd<T>(o, *device, stream, error)) return error;
    if ((error = bwd_reduce<T>(o, stream)) != cudaSuccess) return error;
    o.k = o.new_k;
    return bwd<T>(o, stream);
  });
}
