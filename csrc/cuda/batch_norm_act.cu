// Launchers of batch_norm_act: choice of dtype, layout, vector width and grid.
#include "cuda/batch_norm_act.cuh"

#include <algorithm>

namespace fuseblock {
namespace {

constexpr int64_t kMostSplits = 256;
// Blocks of a reduction: a few for every multiprocessor of a large GPU, whatever the device, so that the order of a sum
// depends on the shape alone.
constexpr int64_t kReductionBlocks = 528;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions (kLast) or elements of a channel, and channels that share a block at least.
int64_t reduction_splits(const BatchNormAct& op) {
  const int64_t share = op.channels_last ? 32 : 16 * kNormThreads;
  const int64_t blocks = op.channels_last ? divide_up(op.channels, 128) : op.channels;
  const int64_t wanted = std::min(divide_up(op.samples * op.size, share), divide_up(kReductionBlocks, blocks));
  return std::clamp<int64_t>(wanted, 1, kMostSplits);
}

struct NormGrid {
  dim3 blocks, threads;
};

// `splits`: blocks that share the positions of a channel; 0: as many as give every thread about four visits.
bool make_grid(const BatchNormAct& op, int width, int64_t splits, NormGrid& grid) {
  int64_t across = 1, chunks = op.channels, visits = op.samples * (op.size / width);
  if (op.channels_last) {
    const int64_t vectors = op.channels / width;
    chunks = divide_up(vectors, 32);
    across = divide_up(vectors, chunks);
    visits = op.size;
  }
  const int64_t along = std::min(kNormThreads / across, divide_up(divide_up(visits, std::max<int64_t>(splits, 1)), 32) * 32);
  if (splits == 0) splits = std::min<int64_t>(divide_up(visits, 4 * along), 65535);
  if (chunks > INT32_MAX) return false;
  grid.blocks = dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(splits));
  grid.threads = dim3(static_cast<unsigned>(across), static_cast<unsigned>(along));
  return true;
}

// Whether every run of neighbours can be read in vectors of N elements of T.
template <class T, int N>
bool can_vectorise(const BatchNormAct& op) {
  const void* all[] = {op.x, op.residual, op.dy, op.v, op.v_residual, op.y, op.dx, op.dresidual, op.a_x, op.a_dy, op.a_residual};
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * N) == 0; };
  return (op.channels_last ? op.channels : op.size) % N == 0 && std::all_of(std::begin(all), std::end(all), aligned);
}

// Calls launch.operator()<T>() for the type that the number names, unless there is nothing to do.
template <class Launch>
cudaError_t dispatch(const BatchNormAct& op, int dtype, Launch launch) {
  if (op.samples < 0 || op.channels < 0 || op.size < 0) return cudaErrorInvalidValue;
  if (op.samples == 0 || op.channels == 0 || op.size == 0) return cudaSuccess;
  if (dtype == kFloat64) return launch.template operator()<double>();
  if (dtype == kFloat32) return launch.template operator()<float>();
  if (dtype == kFloat16) return launch.template operator()<__half>();
  if (dtype == kBFloat16) return launch.template operator()<__nv_bfloat16>();
  return cudaErrorInvalidValue;
}

// The four variants of a kernel<T, N, kLast, ...>; returns from the function where the grid is too large.
#define FB_LAUNCH_NORM(kernel, T, W, splits, ...)                                                              \
  do {                                                                                                         \
    NormGrid grid;                                                                                             \
    const bool wide = can_vectorise<T, W>(op);                                                                 \
    if (!make_grid(op, wide ? W : 1, (splits), grid)) return cudaErrorInvalidValue;                            \
    if (wide && op.channels_last) {                                                                            \
      FB_LAUNCH((kernel<T, W, true __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, op);    \
    } else if (wide) {                                                                                         \
      FB_LAUNCH((kernel<T, W, false __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, op);   \
    } else if (op.channels_last) {                                                                             \
      FB_LAUNCH((kernel<T, 1, true __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, op);    \
    } else {                                                                                                   \
      FB_LAUNCH((kernel<T, 1, false __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, op);   \
    }                                                                                                          \
  } while (false)

// Second-order kernels hold many values per element in registers.
template <class T>
constexpr int kSecondWidth = std::min(kVectorWidth<T>, 4);

template <class S>
cudaError_t combine(const BatchNormAct& op, int64_t splits, int sums, bool moments, void* stream) {
  if (splits > 1) {
    const int count = static_cast<int>(splits);
    const dim3 blocks(static_cast<unsigned>(divide_up(op.channels, kCombineWidth)), static_cast<unsigned>(sums));
    const dim3 threads(kCombineWidth, kCombineHeight);
    if (moments) {
      FB_LAUNCH((batch_norm_act_combine_stats_kernel<S>), blocks, threads, 0, stream, op, count);
    } else {
      FB_LAUNCH((batch_norm_act_combine_sums_kernel<S>), blocks, threads, 0, stream, op, count);
    }
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t stats(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  FB_LAUNCH_NORM(batch_norm_act_stats_kernel, T, kVectorWidth<T>, splits);
  return combine<State<T>>(op, splits, 1, true, stream);
}

template <class T>
cudaError_t fwd(BatchNormAct op, void* stream) {
  constexpr int width = kVectorWidth<T>;
  // Eight neighbours per thread need not be of one row, so only addresses count.
  const int64_t total = op.samples * op.channels * op.size;
  if (op.channels_last) op = [](BatchNormAct o) { return o.samples = o.size, o.size = 1, o.channels_last = false, o; }(op);
  BatchNormAct flat = op;
  flat.size = total;
  const int64_t blocks = divide_up(total, 8 * kNormThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (can_vectorise<T, width>(flat)) {
    FB_LAUNCH((batch_norm_act_fwd_kernel<T, width>), grid, dim3(kNormThreads), 0, stream, op);
  } else {
    FB_LAUNCH((batch_norm_act_fwd_kernel<T, 1>), grid, dim3(kNormThreads), 0, stream, op);
  }
  return cudaGetLastError();
}

bool is_prelu_or_smooth(const BatchNormAct& op) { return op.activation >= static_cast<int>(Activation::prelu); }

template <class T>
cudaError_t bwd_reduce(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  FB_LAUNCH_NORM(batch_norm_act_bwd_reduce_kernel, T, kVectorWidth<T>, splits);
  const int sums = op.activation == static_cast<int>(Activation::prelu) ? 3 : 2;
  return combine<State<T>>(op, splits, sums, false, stream);
}

template <class T>
cudaError_t bwd(const BatchNormAct& op, void* stream) {
  FB_LAUNCH_NORM(batch_norm_act_bwd_kernel, T, kVectorWidth<T>, 0);
  return cudaGetLastError();
}

template <class T>
cudaError_t bwd_bwd_reduce(const BatchNormAct& op, void* stream) {
  const int64_t splits = reduction_splits(op);
  if (!is_prelu_or_smooth(op)) {
    FB_LAUNCH_NORM(batch_norm_act_bwd_bwd_reduce_kernel, T, kSecondWidth<T>, splits, 5);
    return combine<State<T>>(op, splits, 5, false, stream);
  }
  FB_LAUNCH_NORM(batch_norm_act_bwd_bwd_reduce_kernel, T, kSecondWidth<T>, splits, 12);
  return combine<State<T>>(op, splits, op.v_residual == nullptr ? 10 : 12, false, stream);
}

template <class T>
cudaError_t bwd_bwd(const BatchNormAct& op, void* stream) {
  FB_LAUNCH_NORM(batch_norm_act_bwd_bwd_kernel, T, kSecondWidth<T>, 0);
  return cudaGetLastError();
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int64_t batch_norm_act_splits(const BatchNormAct* op) { return reduction_splits(*op); }

int launch_batch_norm_act_stats(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return stats<T>(*op, stream); });
}

int launch_batch_norm_act_fwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return fwd<T>(*op, stream); });
}

int launch_batch_norm_act_bwd_reduce(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd_reduce<T>(*op, stream); });
}

int launch_batch_norm_act_bwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd<T>(*op, stream); });
}

int launch_batch_norm_act_bwd_bwd_reduce(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd_bwd_reduce<T>(*op, stream); });
}

int launch_batch_norm_act_bwd_bwd(const BatchNormAct* op, int dtype, void* stream) {
  return dispatch(*op, dtype, [&]<class T>() { return bwd_bwd<T>(*op, stream); });
}
