// Launcher of the upfirdn2d kernels: choice of kernel, dtype, vector width and grid.
#include "cuda/upfirdn2d.cuh"

#include <algorithm>

namespace fuseblock {
namespace {

// Threads of one launch, at most: indices are 32-bit.
constexpr int64_t kThreadsPerLaunch = int64_t(1) << 30;

template <int kUp>
int tiles(int size, int tile, int pad) {
  return (size + tile_shift<kUp>(pad) + tile - 1) / tile;
}

// Launches over groups of planes that 32-bit indices can number; `launch` takes an operand with fewer planes and blocks.
template <class T, class Launch>
cudaError_t for_planes(Upfirdn2d op, int64_t threads_per_plane, Launch launch) {
  const int64_t most = kThreadsPerLaunch / threads_per_plane;
  if (most == 0) return cudaErrorInvalidValue;
  for (int64_t left = op.planes; left > 0; left -= op.planes) {
    op.planes = std::min(left, most);
    launch(op, static_cast<unsigned>((op.planes * threads_per_plane + kUpfirdn2dThreads - 1) / kUpfirdn2dThreads));
    op.x = static_cast<const T*>(op.x) + op.planes * op.in_h * op.in_w * op.channels;
    op.y = static_cast<T*>(op.y) + op.planes * op.out_h * op.out_w * op.channels;
  }
  return cudaGetLastError();
}

template <class T, int N, int kUp, int kDown>
cudaError_t run_tiles(const Upfirdn2d& op, void* stream) {
  using Tile = Upfirdn2dTile<kUp, kDown>;
  const int columns = tiles<kUp>(op.out_w, Tile::x, op.pad_x), rows = tiles<kUp>(op.out_h, Tile::y, op.pad_y);
  return for_planes<T>(op, int64_t(columns) * rows * (op.channels / N), [&](const Upfirdn2d& part, unsigned blocks) {
    FB_LAUNCH((upfirdn2d_tile_kernel<T, N, kUp, kDown>), dim3(blocks), dim3(kUpfirdn2dThreads), 0, stream, part, columns, rows);
  });
}

template <class T, int N, int kUp, int kDown>
cudaError_t run_rows(const Upfirdn2d& op, void* stream) {
  const int columns = op.out_w / N, rows = tiles<kUp>(op.out_h, Upfirdn2dTile<kUp, kDown>::y, op.pad_y);
  return for_planes<T>(op, int64_t(columns) * rows, [&](const Upfirdn2d& part, unsigned blocks) {
    FB_LAUNCH((upfirdn2d_row_kernel<T, N, kUp, kDown>), dim3(blocks), dim3(kUpfirdn2dThreads), 0, stream, part, columns, rows);
  });
}

// Vectors of one channel's pixels; float64 is here to be right, not fast.
template <class T>
bool has_whole_rows(const Upfirdn2d& op) {
  constexpr int width = kVectorWidth<T>;
  return width > 2 && op.channels == 1 && op.in_w % width == 0 && op.out_w % width == 0;
}

template <class T, int N, int kUp, int kDown>
cudaError_t run_images(const Upfirdn2d& op, bool aligned, void* stream) {
  if constexpr (N == 1 && kVectorWidth<T> > 2) {
    if (aligned && has_whole_rows<T>(op)) return run_rows<T, kVectorWidth<T>, kUp, kDown>(op, stream);
  }
  return run_tiles<T, N, kUp, kDown>(op, stream);
}

template <class T, int N>
cudaError_t run(const Upfirdn2d& op, bool aligned, void* stream) {
  const bool square = op.up_x == op.up_y && op.down_x == op.down_y && op.taps_x == kTileTaps && op.taps_y == kTileTaps;
  if (square && op.up_x == 1 && op.down_x == 1) return run_images<T, N, 1, 1>(op, aligned, stream);
  if (square && op.up_x == 2 && op.down_x == 1) return run_images<T, N, 2, 1>(op, aligned, stream);
  if (square && op.up_x == 1 && op.down_x == 2) return run_images<T, N, 1, 2>(op, aligned, stream);
  return for_planes<T>(op, int64_t(op.out_w) * op.out_h * (op.channels / N), [&](const Upfirdn2d& part, unsigned blocks) {
    FB_LAUNCH((upfirdn2d_kernel<T, N>), dim3(blocks), dim3(kUpfirdn2dThreads), 0, stream, part);
  });
}

template <class T>
cudaError_t choose_width(const Upfirdn2d& op, void* stream) {
  const bool aligned = (reinterpret_cast<uintptr_t>(op.x) | reinterpret_cast<uintptr_t>(op.y)) % 16 == 0;
  if (aligned && op.channels % kVectorWidth<T> == 0) return run<T, kVectorWidth<T>>(op, aligned, stream);
  return run<T, 1>(op, aligned, stream);
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int launch_upfirdn2d(const Upfirdn2d* op, int dtype, void* stream) {
  if (op->planes == 0 || op->channels == 0) return cudaSuccess;
  switch (dtype) {
    case kFloat64: return choose_width<double>(*op, stream);
    case kFloat32: return choose_width<float>(*op, stream);
    case kFloat16: return choose_width<__half>(*op, stream);
    case kBFloat16: return choose_width<__nv_bfloat16>(*op, stream);
    default: return cudaErrorInvalidValue;
  }
}
