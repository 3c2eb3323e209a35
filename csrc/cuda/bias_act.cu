// Launchers of the bias_act kernels: choice of dtype, vector width and grid.
#include "cuda/bias_act.cuh"

#include "cuda/channel_grid.h"

namespace fuseblock {
namespace {

template <class T, int N>
bool can_vectorise(const BiasAct& op) {
  return can_vectorise<T, N>(op, {op.x, op.dy, op.v, op.out, op.a_x});
}

template <class T>
cudaError_t fwd(const BiasAct& op, void* stream) {
  constexpr int width = kChannelWidth<T> == 1 ? 1 : kSpan;
  if (op.new_mask == nullptr || can_vectorise<T, width>(op)) {
    FB_LAUNCH_CHANNELS(bias_act_fwd_kernel, T, width, width, 0, ());
    return cudaGetLastError();
  }
  const int64_t blocks = divide_up(elements(op), kSpan * kChannelThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  FB_LAUNCH((bias_act_fwd_masked_kernel<T>), grid, dim3(kChannelThreads), 0, stream, op);
  return cudaGetLastError();
}

template <class T>
cudaError_t sum(const BiasAct& op, void* stream) {
  if (op.partials == nullptr) return cudaGetLastError();
  const unsigned kinds = op.activation == static_cast<int>(Activation::prelu) ? 2 : 1;
  const dim3 grid(static_cast<unsigned>(divide_up(op.channels, kCombineWidth)), kinds), threads(kCombineWidth, kCombineHeight);
  FB_LAUNCH((bias_act_sum_kernel<State<T>>), grid, threads, 0, stream, op, reduction_splits(op));
  return cudaGetLastError();
}

// Without sums, blocks need not be few.
int64_t parts_of(const BiasAct& op) { return op.partials == nullptr ? 0 : reduction_splits(op); }

template <class T>
cudaError_t bwd(const BiasAct& op, void* stream) {
  FB_LAUNCH_CHANNELS(bias_act_bwd_kernel, T, kChannelWidth<T>, kChannelWidth<T>, parts_of(op), ());
  return sum<T>(op, stream);
}

template <class T>
cudaError_t bwd_bwd(const BiasAct& op, void* stream) {
  FB_LAUNCH_CHANNELS(bias_act_bwd_bwd_kernel, T, kChannelWidth<T>, kChannelWidth<T>, parts_of(op), ());
  return sum<T>(op, stream);
}

template <class Launch>
cudaError_t dispatch(const BiasAct& op, int dtype, Launch launch) {
  const bool known = op.activation >= 0 && op.activation <= static_cast<int>(Activation::elu);
  if (op.samples < 0 || op.channels < 0 || op.size < 0 || !known) return cudaErrorInvalidValue;
  if (elements(op) == 0) return cudaSuccess;
  return dispatch_dtype(dtype, launch);
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int64_t bias_act_splits(const BiasAct* op) { return elements(*op) == 0 ? 0 : reduction_splits(*op); }

int launch_bias_act_fwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return fwd<T>(*op, stream); });
}

int launch_bias_act_bwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd<T>(*op, stream); });
}

int launch_bias_act_bwd_bwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd_bwd<T>(*op, stream); });
}
