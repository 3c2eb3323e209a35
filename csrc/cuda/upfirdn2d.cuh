// upfirdn2d kernels; equation and operands: upfirdn2d.h.
//
//   tiles    4 x 4 taps, the same factor 1 or 2 in x and y: a thread does a small tile of outputs of N channels, so that an
//            input is loaded once for all its products. Tiles start at multiples of the upsampling factor (in the padded
//            image): which tap meets which input is known at compile time, and the filter stays in registers
//   generic  any filter and factors, an output of N channels per thread
//
// Bytes an element, b of T: b read a sample of x, b written a sample of y; neighbours meet in the first cache. N > 1 moves
// 16 bytes a time (channels-last). Accumulates in float (double for double).
#pragma once

#include "cuda/upfirdn2d.h"
#include "cuda/vector.h"

namespace fuseblock {

inline constexpr int kUpfirdn2dThreads = 128;
inline constexpr int kTileTaps = 4;

// Outputs of a tile: all phases of an upsampling, and in y a few more.
template <int kUp, int kDown>
struct Upfirdn2dTile {
  static constexpr int x = kUp, y = kUp == 1 && kDown == 1 ? 4 : 2;
  // Inputs that the tile's outputs need.
  static constexpr int in_x = ((x - 1) * kDown + kTileTaps - 1) / kUp + 1, in_y = ((y - 1) * kDown + kTileTaps - 1) / kUp + 1;
};

// -pad mod kUp: the first tile starts so many samples before the image, where the padded image has an input.
template <int kUp>
FB_HD int tile_shift(int pad) {
  const int rest = pad % kUp;
  return rest > 0 ? kUp - rest : -rest;
}

template <class S>
FB_HD S filter_tap(const Upfirdn2d& op, int k, int l) {
  const S* f = static_cast<const S*>(op.f);
  return op.flip_filter ? f[k * op.taps_x + l] : f[(op.taps_y - 1 - k) * op.taps_x + op.taps_x - 1 - l];
}

template <class T, int N>
FB_HD Vec<T, N> load_pixel(const Upfirdn2d& op, int64_t plane, int row, int column, int channel) {
  const int64_t pixel = (plane * op.in_h + row) * op.in_w + column;
  return *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(op.x) + pixel * op.channels + channel);
}

template <class T, int N>
FB_HD void store_pixel(const Upfirdn2d& op, int64_t plane, int row, int column, int channel, const State<T> (&sum)[N]) {
  Vec<T, N> y;
#pragma unroll
  for (int n = 0; n < N; ++n) y.set(n, sum[n] * static_cast<State<T>>(op.gain));
  const int64_t pixel = (plane * op.out_h + row) * op.out_w + column;
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(op.y) + pixel * op.channels + channel) = y;
}

// Where a thread works: channel fastest, then columns and rows (of tiles or of outputs), then planes.
struct Upfirdn2dPlace {
  int channel, column, row;
  int64_t plane;

  __device__ Upfirdn2dPlace(const Upfirdn2d& op, int vector, unsigned columns, unsigned rows) {
    const unsigned vectors = static_cast<unsigned>(op.channels) / vector;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    channel = static_cast<int>(i % vectors) * vector;
    i /= vectors;
    column = static_cast<int>(i % columns);
    i /= columns;
    row = static_cast<int>(i % rows);
    plane = i / rows;
  }
};

template <class T, int N, int kUp, int kDown>
__global__ void __launch_bounds__(kUpfirdn2dThreads, 4) upfirdn2d_tile_kernel(const Upfirdn2d op, int columns, int rows) {
  using S = State<T>;
  using Tile = Upfirdn2dTile<kUp, kDown>;
  const Upfirdn2dPlace at(op, N, columns, rows);
  if (at.plane >= op.planes) return;
  S w[kTileTaps][kTileTaps];
#pragma unroll
  for (int k = 0; k < kTileTaps; ++k) {
#pragma unroll
    for (int l = 0; l < kTileTaps; ++l) w[k][l] = filter_tap<S>(op, k, l);
  }
  const int row = at.row * Tile::y - tile_shift<kUp>(op.pad_y), column = at.column * Tile::x - tile_shift<kUp>(op.pad_x);
  const int in_row = (row * kDown - op.pad_y) / kUp, in_column = (column * kDown - op.pad_x) / kUp;  // exact
  S sum[Tile::y][Tile::x][N] = {};
#pragma unroll
  for (int r = 0; r < Tile::in_y; ++r) {
    if (in_row + r < 0 || in_row + r >= op.in_h) continue;
#pragma unroll
    for (int c = 0; c < Tile::in_x; ++c) {
      if (in_column + c < 0 || in_column + c >= op.in_w) continue;
      const Vec<T, N> x = load_pixel<T, N>(op, at.plane, in_row + r, in_column + c, at.channel);
#pragma unroll
      for (int i = 0; i < Tile::y; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::x; ++j) {
          const int k = r * kUp - i * kDown, l = c * kUp - j * kDown;
          if (k < 0 || k >= kTileTaps || l < 0 || l >= kTileTaps) continue;
#pragma unroll
          for (int n = 0; n < N; ++n) sum[i][j][n] += w[k][l] * x[n];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::y; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::x; ++j) {
      const bool inside = row + i >= 0 && row + i < op.out_h && column + j >= 0 && column + j < op.out_w;
      if (inside) store_pixel<T, N>(op, at.plane, row + i, column + j, at.channel, sum[i][j]);
    }
  }
}

// The first tap that meets an input or a place where one would be, for the window at `place` of the upsampled image.
FB_HD int first_tap(int place, int up) {
  const int rest = place % up;
  return rest > 0 ? up - rest : -rest;
}

template <class T, int N>
__global__ void __launch_bounds__(kUpfirdn2dThreads, 4) upfirdn2d_kernel(const Upfirdn2d op) {
  using S = State<T>;
  const Upfirdn2dPlace at(op, N, op.out_w, op.out_h);
  if (at.plane >= op.planes) return;
  const int place_y = at.row * op.down_y - op.pad_y, place_x = at.column * op.down_x - op.pad_x;
  const int first_l = first_tap(place_x, op.up_x);
  S sum[N] = {};
  for (int k = first_tap(place_y, op.up_y); k < op.taps_y; k += op.up_y) {
    const int in_row = (place_y + k) / op.up_y;
    if (place_y + k < 0 || in_row >= op.in_h) continue;
    int in_column = (place_x + first_l) / op.up_x;
    for (int l = first_l; l < op.taps_x; l += op.up_x, ++in_column) {
      if (in_column < 0 || in_column >= op.in_w) continue;
      const S w = filter_tap<S>(op, k, l);
      const Vec<T, N> x = load_pixel<T, N>(op, at.plane, in_row, in_column, at.channel);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += w * x[n];
    }
  }
  store_pixel<T, N>(op, at.plane, at.row, at.column, at.channel, sum);
}

}  // namespace fuseblock
