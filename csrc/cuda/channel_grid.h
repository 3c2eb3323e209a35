// Grids of kernels that walk over channels (channels.cuh), and the widths of their vectors.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda/channels.cuh"

namespace fuseblock {

struct ChannelGrid {
  dim3 blocks, threads;
};

// `chunks` of a sample (or of all, contiguous) shared by `parts` blocks each, along x or y; sets what threads need to walk.
// `width`: elements of a vector, whose channels `sharers` threads have, where they are last.
inline bool make_grid(ChannelLayout& layout, int width, int sharers, int64_t chunks, int64_t parts, bool parts_along_x,
                      ChannelGrid& grid) {
  const int64_t vectors = layout.channels_last ? layout.channels / width : 1;
  const int64_t columns = layout.channels_last ? 1 : layout.size / width;
  const int64_t visits = layout.channels_last ? divide_up(layout.size, sharers) : layout.samples * columns;
  const int64_t across = layout.channels_last ? divide_up(vectors, chunks) * sharers : 1;
  const int64_t fewest = divide_up(visits, std::max<int64_t>(parts, 1));
  const int64_t along = std::min(kChannelThreads / across, divide_up(fewest, 32) * 32);
  // 0: as many as give every thread about four visits.
  if (parts == 0) parts = std::min<int64_t>(divide_up(visits, 4 * along), 65535);
  const int64_t all = layout.channels_last ? chunks * layout.samples : layout.channels, x = parts_along_x ? all * parts : all;
  if (x > INT32_MAX) return false;
  grid.blocks = dim3(static_cast<unsigned>(x), static_cast<unsigned>(parts_along_x ? 1 : parts));
  grid.threads = dim3(static_cast<unsigned>(across), static_cast<unsigned>(along));
  layout.chunks = chunks;
  const int64_t row = layout.channels_last ? sharers * layout.channels : layout.channels * layout.size;
  layout.row_step = parts * along / columns, layout.column_step = parts * along % columns;
  layout.step = layout.row_step * row + layout.column_step * width;
  return true;
}

// `splits`: blocks that share the positions of a channel, or 0.
inline bool make_grid(ChannelLayout& layout, int width, int sharers, int64_t splits, ChannelGrid& grid) {
  const int64_t chunks = layout.channels_last ? divide_up(layout.channels / width * sharers, 32) : 1;
  return make_grid(layout, width, sharers, chunks, splits, false, grid);
}

// Blocks that share a channel in a reduction: so many that every multiprocessor of a large GPU has a few, but none without two
// visits for each of its threads, as what it leaves has to be added up. That depends on the shape alone, whatever the device
// and the alignment, and so does the order of a sum.
inline int64_t reduction_splits(const ChannelLayout& layout) {
  constexpr int64_t kBlocks = 528, kMostSplits = 256, kShare = 16 * kChannelThreads, kNeighbours = 128;
  const bool last = layout.channels_last;
  const int64_t blocks = last ? layout.samples * divide_up(layout.channels, kNeighbours) : layout.channels;
  const int64_t elements = last ? layout.size * std::min(layout.channels, kNeighbours) : layout.samples * layout.size;
  const int64_t wanted = std::min(divide_up(elements, kShare), divide_up(kBlocks, blocks));
  return std::clamp<int64_t>(wanted, 1, kMostSplits);
}

// Whether every run of neighbours in these tensors can be read in vectors of N elements of T.
template <class T, int N>
bool can_vectorise(const ChannelLayout& layout, std::initializer_list<const void*> tensors) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, N>) == 0; };
  return N > 1 && (layout.channels_last ? layout.channels : layout.size) % N == 0 &&
         std::all_of(tensors.begin(), tensors.end(), aligned);
}

// Elements of a visit of 16 bytes. float64 is here to be right, not fast: it has one element at a time.
template <class T>
inline constexpr int kChannelWidth = std::is_same_v<T, double> ? 1 : kVectorWidth<T>;

// Calls launch.operator()<T>() for the type that the number names.
template <class Launch>
cudaError_t dispatch_dtype(int dtype, Launch launch) {
  switch (dtype) {
    case kFloat64: return launch.template operator()<double>();
    case kFloat32: return launch.template operator()<float>();
    case kFloat16: return launch.template operator()<__half>();
    case kBFloat16: return launch.template operator()<__nv_bfloat16>();
    default: return cudaErrorInvalidValue;
  }
}

// Launches kernel<T, N, L, ...>: contiguous <T, W, 1>, channels-last <T, W, L_LAST>, or <T, 1, 1> in either layout where rows
// are not aligned. `op`, in scope like `stream`, is a ChannelLayout that can_vectorise<T, W>() knows; arguments behind it are
// in parentheses. Returns from the function where the grid is too large.
#define FB_LAUNCH_CHANNELS(kernel, T, W, L_LAST, splits, arguments, ...)                                   \
  do {                                                                                                     \
    ChannelGrid grid;                                                                                      \
    auto placed = op;                                                                                      \
    const bool wide = can_vectorise<T, W>(op);                                                             \
    if (!make_grid(placed, wide ? W : 1, wide ? W / L_LAST : 1, (splits), grid)) return cudaErrorInvalidValue; \
    if (!wide) {                                                                                           \
      FB_LAUNCH((kernel<T, 1, 1 __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream,        \
                placed FB_UNWRAP arguments);                                                               \
    } else if constexpr (W > 1) {                                                                          \
      if (op.channels_last) {                                                                              \
        FB_LAUNCH((kernel<T, W, L_LAST __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, \
                  placed FB_UNWRAP arguments);                                                             \
      } else {                                                                                             \
        FB_LAUNCH((kernel<T, W, 1 __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream,      \
                  placed FB_UNWRAP arguments);                                                             \
      }                                                                                                    \
    }                                                                                                      \
  } while (false)

}  // namespace fuseblock
