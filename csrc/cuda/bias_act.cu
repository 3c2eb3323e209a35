// Launchers of the bias_act kernels: choice of dtype, vector width and grid.
#include "cuda/bias_act.cuh"

namespace fuseblock {
namespace {

// Blocks of a launch, about: a few waves on every GPU, and few partial sums.
constexpr int64_t kBlocks = 2048;
// Elements that a thread has at least, so that adding up the blocks' sums stays cheap.
constexpr int64_t kElementsPerThread = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t positions(const BiasAct& op) { return op.count / op.channels; }

// Splits must not depend on whether the operands are aligned: they are counted in elements.
int64_t splits_of(const BiasAct& op) {
  const bool last = op.inner == 1;
  const int64_t blocks = last ? ceil_div(op.channels, kChannelThreads<true>) : op.channels;
  const int64_t rows = kBiasActThreads / (last ? kChannelThreads<true> : kChannelThreads<false>);
  const int64_t most = ceil_div(positions(op), rows * kElementsPerThread), wanted = ceil_div(kBlocks, blocks);
  return most < wanted ? most : wanted;
}

template <class T>
bool is_wide(const BiasAct& op, int width) {
  const int64_t run = op.inner == 1 ? op.channels : op.inner;
  bool wide = run % width == 0;
  for (const void* data : {op.x, op.dy, op.v, static_cast<const void*>(op.out), static_cast<const void*>(op.a_x)}) {
    wide = wide && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  return wide;
}

template <class T>
cudaError_t fwd(const BiasAct& op, void* stream) {
  const int64_t blocks = ceil_div(ceil_div(op.count, 8), kBiasActThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const bool aligned = reinterpret_cast<uintptr_t>(op.x) % 16 == 0 && reinterpret_cast<uintptr_t>(op.out) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kBiasActThreads);
  if (aligned) {
    FB_LAUNCH((bias_act_fwd_kernel<T, true>), grid, block, 0, stream, op);
  } else {
    FB_LAUNCH((bias_act_fwd_kernel<T, false>), grid, block, 0, stream, op);
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t sum(const BiasAct& op, void* stream) {
  if (op.partials == nullptr) return cudaGetLastError();
  const unsigned kinds = op.activation == static_cast<int>(Activation::prelu) ? 2 : 1;
  const dim3 grid(static_cast<unsigned>(ceil_div(op.channels, kBiasActThreads)), kinds);
  FB_LAUNCH((bias_act_sum_kernel<State<T>>), grid, dim3(kBiasActThreads), 0, stream, op, splits_of(op));
  return cudaGetLastError();
}

#define FB_LAUNCH_WALK(kernel)                                                                                  \
  do {                                                                                                          \
    constexpr int width = kVectorWidth<T>;                                                                      \
    const bool wide = is_wide<T>(op, width), last = op.inner == 1;                                              \
    const int64_t x = last ? ceil_div(op.channels, kChannelThreads<true> * (wide ? width : 1)) : op.channels;   \
    if (x > INT32_MAX) return cudaErrorInvalidValue;                                                            \
    const int along = last ? kChannelThreads<true> : kChannelThreads<false>;                                    \
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(splits_of(op)));                            \
    const dim3 block(along, kBiasActThreads / along);                                                           \
    if (last && wide) FB_LAUNCH((kernel<T, width, true>), grid, block, 0, stream, op);                          \
    else if (last) FB_LAUNCH((kernel<T, 1, true>), grid, block, 0, stream, op);                                 \
    else if (wide) FB_LAUNCH((kernel<T, width, false>), grid, block, 0, stream, op);                            \
    else FB_LAUNCH((kernel<T, 1, false>), grid, block, 0, stream, op);                                          \
  } while (false)

template <class T>
cudaError_t bwd(const BiasAct& op, void* stream) {
  FB_LAUNCH_WALK(bias_act_bwd_kernel);
  return sum<T>(op, stream);
}

template <class T>
cudaError_t bwd_bwd(const BiasAct& op, void* stream) {
  FB_LAUNCH_WALK(bias_act_bwd_bwd_kernel);
  return sum<T>(op, stream);
}

template <class Launch>
cudaError_t dispatch(const BiasAct& op, int dtype, Launch launch) {
  const bool known = op.activation >= 0 && op.activation <= static_cast<int>(Activation::elu);
  if (op.count < 0 || !known) return cudaErrorInvalidValue;
  if (op.count == 0) return cudaSuccess;
  if (op.channels < 1 || op.inner < 1 || op.count % (op.channels * op.inner) != 0) return cudaErrorInvalidValue;
  switch (dtype) {
    case kFloat64: return launch.template operator()<double>();
    case kFloat32: return launch.template operator()<float>();
    case kFloat16: return launch.template operator()<__half>();
    case kBFloat16: return launch.template operator()<__nv_bfloat16>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int64_t bias_act_splits(const BiasAct* op) { return op->count == 0 ? 0 : splits_of(*op); }

int launch_bias_act_fwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return fwd<T>(*op, stream); });
}

int launch_bias_act_bwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd<T>(*op, stream); });
}

int launch_bias_act_bwd_bwd(const BiasAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd_bwd<T>(*op, stream); });
}
