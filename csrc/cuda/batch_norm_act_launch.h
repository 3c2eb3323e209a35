// What the launchers of batch_norm_act share: choice of dtype, layout, vector width and grid.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/batch_norm_act_walk.cuh"

namespace fuseblock {

struct NormGrid {
  dim3 blocks, threads;
};

// `chunks` of a sample (or of all, contiguous) shared by `parts` blocks each, along x or y; sets what threads need to walk.
inline bool make_grid(BatchNormAct& op, int width, int64_t chunks, int64_t parts, bool parts_along_x, NormGrid& grid) {
  const int64_t vectors = op.channels_last ? op.channels / width : 1;
  const int64_t columns = op.channels_last ? 1 : op.size / width;
  const int64_t visits = op.channels_last ? op.size : op.samples * columns;
  const int64_t across = op.channels_last ? divide_up(vectors, chunks) : 1;
  const int64_t fewest = divide_up(visits, std::max<int64_t>(parts, 1));
  const int64_t along = std::min(kNormThreads / across, divide_up(fewest, 32) * 32);
  // 0: as many as give every thread about four visits.
  if (parts == 0) parts = std::min<int64_t>(divide_up(visits, 4 * along), 65535);
  const int64_t all = op.channels_last ? chunks * op.samples : op.channels, x = parts_along_x ? all * parts : all;
  if (x > INT32_MAX) return false;
  grid.blocks = dim3(static_cast<unsigned>(x), static_cast<unsigned>(parts_along_x ? 1 : parts));
  grid.threads = dim3(static_cast<unsigned>(across), static_cast<unsigned>(along));
  op.chunks = chunks;
  op.row_step = parts * along / columns, op.column_step = parts * along % columns;
  return true;
}

// `splits`: blocks that share the positions of a channel, or 0.
inline bool make_grid(BatchNormAct& op, int width, int64_t splits, NormGrid& grid) {
  return make_grid(op, width, op.channels_last ? divide_up(op.channels / width, 32) : 1, splits, false, grid);
}

// Whether all tensors begin at a multiple of 16 bytes, or of N elements if those are fewer bytes.
template <class T, int N>
bool are_aligned(const BatchNormAct& op) {
  const void* all[] = {op.x, op.residual, op.dy, op.v, op.v_residual, op.y, op.dx, op.dresidual, op.a_x, op.a_dy, op.a_residual};
  return std::all_of(std::begin(all), std::end(all),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, N>) == 0; });
}

// Whether every run of neighbours can be read in vectors of N elements of T.
template <class T, int N>
bool can_vectorise(const BatchNormAct& op) {
  return N > 1 && (op.channels_last ? op.channels : op.size) % N == 0 && are_aligned<T, N>(op);
}

// Elements of a visit in first-order kernels. float64 is here to be right, not fast: it has one element at a time.
template <class T>
inline constexpr int kNormWidth = std::is_same_v<T, double> ? 1 : kVectorWidth<T>;

// Calls launch.operator()<T>(op) for the type that the number names, unless there is nothing to do.
template <class Launch>
cudaError_t dispatch_norm(BatchNormAct op, int dtype, Launch launch) {
  if (op.samples < 0 || op.channels < 0 || op.size < 0) return cudaErrorInvalidValue;
  if (op.samples == 0 || op.channels == 0 || op.size == 0) return cudaSuccess;
  if (op.activation == static_cast<int>(Activation::identity)) {
    op.activation = static_cast<int>(Activation::leaky_relu);
    op.negative_slope = 1;
  }
  if (dtype == kFloat64) return launch.template operator()<double>(op);
  if (dtype == kFloat32) return launch.template operator()<float>(op);
  if (dtype == kFloat16) return launch.template operator()<__half>(op);
  if (dtype == kBFloat16) return launch.template operator()<__nv_bfloat16>(op);
  return cudaErrorInvalidValue;
}

// Launches kernel<T, W, L, ...>: channels-last W = L = W_LAST, contiguous L = 1, or W = L = 1 in either layout where rows are
// not aligned. Arguments behind op are in parentheses. Returns from the function where the grid is too large.
#define FB_LAUNCH_NORM(kernel, T, W, W_LAST, splits, arguments, ...)                                         \
  do {                                                                                                       \
    NormGrid grid;                                                                                           \
    BatchNormAct placed = op;                                                                                \
    const bool last = op.channels_last, wide = last ? can_vectorise<T, W_LAST>(op) : can_vectorise<T, W>(op); \
    if (!make_grid(placed, !wide ? 1 : last ? W_LAST : W, (splits), grid)) return cudaErrorInvalidValue;     \
    if (!wide) {                                                                                             \
      FB_LAUNCH((kernel<T, 1, 1 __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream,          \
                placed FB_UNWRAP arguments);                                                                 \
    } else if constexpr (W > 1) {                                                                            \
      if (last) {                                                                                            \
        FB_LAUNCH((kernel<T, W_LAST, W_LAST __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0,      \
                  stream, placed FB_UNWRAP arguments);                                                       \
      } else {                                                                                               \
        FB_LAUNCH((kernel<T, W, 1 __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream,        \
                  placed FB_UNWRAP arguments);                                                               \
      }                                                                                                      \
    }                                                                                                        \
  } while (false)

}  // namespace fuseblock
