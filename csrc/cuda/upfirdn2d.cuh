// upfirdn2d kernels; equation and operands: upfirdn2d.h.
//
//   tiles    4 x 4 taps, the same factor 1 or 2 in x and y: a thread does a small tile of outputs of N channels, so that an
//            input is loaded once for all its products. Tiles start at multiples of the upsampling factor (in the padded
//            image): which tap meets which input is known at compile time, and the filter stays in registers
//   rows     the same filters and factors of images of one channel (NCHW): a thread has N neighbours of some rows of y. Of x
//            it loads the whole vectors that hold what it needs, and moves that to their beginning in registers
//   generic  any filter and factors, an output of N channels per thread
//
// Bytes an element, b of T: b read a sample of x, b written a sample of y; neighbours meet in the first cache. Tiles and the
// generic kernel move 16 bytes a time with the channels last, rows where those of x and y are whole vectors; else single
// elements. Accumulates in float (double for double).
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
  store_vector(static_cast<T*>(op.y) + pixel * op.channels + channel, y);
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

// Neighbours in x that N neighbours in y need at most, and the vectors that hold so many, wherever they begin.
template <int N, int kUp, int kDown>
struct Upfirdn2dRow {
  static constexpr int needed = ((N - 1) * kDown + kTileTaps + kUp - 2) / kUp + 1;
  static constexpr int vectors = (needed + 2 * (N - 1)) / N;
};

// x[n] = x[n + ahead], ahead < 2 kStep: by powers of two, as registers have no index.
template <int kStep, int M, class S>
FB_HD void move_down(S (&x)[M], int ahead) {
  if constexpr (kStep > 0) {
#pragma unroll
    for (int n = 0; n + kStep < M; ++n) {
      const S here = x[n], there = x[n + kStep];
      x[n] = (ahead & kStep) != 0 ? there : here;
    }
    move_down<kStep / 2>(x, ahead);
  }
}

// kRest: places of the upsampled image from the sample on or before the thread's first window to that window.
template <class T, int N, int kUp, int kDown, int kRest>
__device__ void upfirdn2d_rows(const Upfirdn2d& op, const Upfirdn2dPlace& at, int first) {
  using S = State<T>;
  using Tile = Upfirdn2dTile<kUp, kDown>;
  using Row = Upfirdn2dRow<N, kUp, kDown>;
  S w[kTileTaps][kTileTaps];
#pragma unroll
  for (int k = 0; k < kTileTaps; ++k) {
#pragma unroll
    for (int l = 0; l < kTileTaps; ++l) w[k][l] = filter_tap<S>(op, k, l);
  }
  const int row = at.row * Tile::y - tile_shift<kUp>(op.pad_y), in_row = (row * kDown - op.pad_y) / kUp;  // exact
  const int ahead = first & (N - 1);  // of a negative number, too
  S sum[Tile::y][N] = {};
#pragma unroll
  for (int r = 0; r < Tile::in_y; ++r) {
    if (in_row + r < 0 || in_row + r >= op.in_h) continue;
    S x[Row::vectors * N];
#pragma unroll
    for (int v = 0; v < Row::vectors; ++v) {
      const int column = first - ahead + v * N;
      const bool inside = column >= 0 && column < op.in_w;
      const Vec<T, N> some = inside ? load_pixel<T, N>(op, at.plane, in_row + r, column, 0) : zeros<T, N>();
#pragma unroll
      for (int n = 0; n < N; ++n) x[v * N + n] = some[n];
    }
    move_down<N / 2>(x, ahead);
#pragma unroll
    for (int i = 0; i < Tile::y; ++i) {
      const int k = r * kUp - i * kDown;
      if (k < 0 || k >= kTileTaps) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int l = 0; l < kTileTaps; ++l) {
          const int place = n * kDown + l + kRest;
          if (place % kUp == 0) sum[i][n] += w[k][l] * x[place / kUp];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::y; ++i) {
    if (row + i >= 0 && row + i < op.out_h) store_pixel<T, N>(op, at.plane, row + i, at.column * N, 0, sum[i]);
  }
}

template <class T, int N, int kUp, int kDown>
__global__ void __launch_bounds__(kUpfirdn2dThreads, 4) upfirdn2d_row_kernel(const Upfirdn2d op, int columns, int rows) {
  const Upfirdn2dPlace at(op, 1, columns, rows);
  if (at.plane >= op.planes) return;
  const int place = at.column * N * kDown - op.pad_x, rest = place & (kUp - 1), first = (place - rest) / kUp;  // exact
  if (kUp == 1 || rest == 0) return upfirdn2d_rows<T, N, kUp, kDown, 0>(op, at, first);
  if constexpr (kUp == 2) upfirdn2d_rows<T, N, kUp, kDown, 1>(op, at, first);
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
