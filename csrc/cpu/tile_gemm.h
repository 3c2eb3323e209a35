// The matrix products of the recurrence: a few rows times one block of packed weights, into a tile in L1.
//
//   tile[r][v] = sum_k x[r][k] * w[k][v]        r < R rows, v < NV vectors of outputs, k < K
//
// R * NV accumulators stay in registers. Packed weights are zero-padded to whole vectors and lie as
// [block][k][NV][lanes], so that a block streams in order of use and stays in L2 while the rows pass.
//   gates layout: NV = 4, the four gates of the same units (rows g*H + u of a (4H, K) matrix);
//   flat layout:  NV <= 4 consecutive vectors of outputs, blocks of nearly equal size.
#pragma once

#include "simd.h"

namespace fuseblock::FB_ISA {

#if FB_VEC_BYTES == 64
constexpr int kTileRows = 6;  // 24 accumulators, 4 weights and a broadcast in 32 registers
#elif FB_VEC_BYTES == 32
constexpr int kTileRows = 3;  // 12 accumulators in 16 registers
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileVecs = 4;

// Keeps a value in a register: GCC would load a weight again for every row that uses it.
#if defined(__x86_64__) && !defined(__clang__)
#define FB_PIN(raw) asm("" : "+v"(raw))
#else
#define FB_PIN(raw)
#endif

// Few accumulators do not hide the latency of a multiply-add, so K is then split over several sets of them.
constexpr int tile_sets(int accumulators) {
  constexpr int most = kTileRows * kTileVecs;
  return accumulators > most / 2 ? 1 : accumulators > most / 4 ? 2 : 4;
}

// A sum is made of partial sums of this many terms, which keeps its rounding error from growing with K.
constexpr int64_t kTermsPerSum = 64;

template <class C, int R, int NV>
__attribute__((noinline)) void tile_gemm(int64_t K, const C* __restrict w, const C* __restrict x, int64_t ldx,
                                         C* __restrict tile) {
  using V = Vec<C>;
  constexpr int sets = tile_sets(R * NV);
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kTermsPerSum) {
    const int64_t end = K - begin < kTermsPerSum ? K : begin + kTermsPerSum;
    V acc[sets][R][NV];
#pragma GCC unroll 4
    for (int s = 0; s < sets; ++s)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[s][r][v] = V(C(0));

    auto multiply = [&](int64_t k, V(&a)[R][NV]) __attribute__((always_inline)) {
      V xk[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) xk[r] = V(x[r * ldx + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        V wk = load<C>(w + (k * NV + v) * V::size, Full{});
        FB_PIN(wk.raw);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r][v] = a[r][v] + xk[r] * wk;
      }
    };
    int64_t k = begin;
    for (; k + sets <= end; k += sets) {
#pragma GCC unroll 4
      for (int s = 0; s < sets; ++s) multiply(k + s, acc[s]);
    }
    if constexpr (sets > 1)
      for (; k < end; ++k) multiply(k, acc[0]);

#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        C* const out = tile + (r * NV + v) * V::size;
        V sum = acc[0][r][v];
#pragma GCC unroll 4
        for (int s = 1; s < sets; ++s) sum = sum + acc[s][r][v];
        store(out, begin == 0 ? sum : load<C>(out, Full{}) + sum, Full{});
      }
  }
}

template <class C>
using TileFn = void (*)(int64_t K, const C* w, const C* x, int64_t ldx, C* tile);

template <class C, int NV>
FB_INLINE TileFn<C> tile_fn_rows(int rows) {
  switch (rows) {
    case 1: return tile_gemm<C, 1, NV>;
    case 2: return tile_gemm<C, 2, NV>;
#if FB_VEC_BYTES >= 32
    case 3: return tile_gemm<C, 3, NV>;
#endif
#if FB_VEC_BYTES >= 64
    case 4: return tile_gemm<C, 4, NV>;
    case 5: return tile_gemm<C, 5, NV>;
    case 6: return tile_gemm<C, 6, NV>;
#endif
    default: return nullptr;
  }
}

template <class C>
inline TileFn<C> tile_fn(int rows, int vecs) {
  switch (vecs) {
    case 1: return tile_fn_rows<C, 1>(rows);
    case 2: return tile_fn_rows<C, 2>(rows);
    case 3: return tile_fn_rows<C, 3>(rows);
    default: return tile_fn_rows<C, 4>(rows);
  }
}

// Rows [begin, end) cut into tiles of nearly equal numbers of rows.
struct RowTiles {
  int64_t begin, count, rows, larger;  // the first `larger` tiles have one row more

  RowTiles(int64_t first, int64_t end) : begin(first), count((end - first + kTileRows - 1) / kTileRows), rows(0), larger(0) {
    if (count > 0) rows = (end - first) / count, larger = (end - first) - rows * count;
  }
};

// Calls product(rows, x + row * ldx, tile) and then consume(tile, row, rows) for every tile.
template <class C, class Product, class Consume>
FB_INLINE void for_tiles(const C* x, int64_t ldx, const RowTiles& tiles, Product&& product, Consume&& consume) {
  alignas(FB_VEC_BYTES) C tile[kTileRows * kTileVecs * Vec<C>::size];
  int64_t row = tiles.begin;
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int rows = (int)(tiles.rows + (i < tiles.larger));
    product(rows, x + row * ldx, tile);
    if (rows > kTileRows) __builtin_unreachable();  // keeps the compiler from warning about overrunning the tile
    consume(tile, row, rows);
    row += rows;
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

template <class C>
FB_INLINE void transpose_square(Vec<C> (&m)[Vec<C>::size]) {
  using V = Vec<C>;
  constexpr int n = V::size;
#if defined(__GNUC__) && !defined(__clang__)
  // Interleaving the first half of the vectors with the second, log2(n) times, transposes.
  typename V::Bits low, high;
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) {
    low[j] = j / 2 + (j % 2) * n;
    high[j] = low[j] + n / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    V t[n];
#pragma GCC unroll 16
    for (int j = 0; j < n / 2; ++j) {
      t[2 * j] = V(__builtin_shuffle(m[j].raw, m[j + n / 2].raw, low));
      t[2 * j + 1] = V(__builtin_shuffle(m[j].raw, m[j + n / 2].raw, high));
    }
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) m[j] = t[j];
  }
#else
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) {
      const C swapped = m[i].raw[j];
      m[i].raw[j] = m[j].raw[i];
      m[j].raw[i] = swapped;
    }
#endif
}

// One vector of outputs: dst[k * dst_stride + lane] = src[lane * lane_stride + k], zero from `lanes` on.
template <class S>
void pack_transposed(Compute<S>* dst, int64_t dst_stride, const S* src, int64_t lane_stride, int lanes, int64_t K) {
  using C = Compute<S>;
  using V = Vec<C>;
  for (int64_t k = 0; k < K; k += V::size) {
    V square[V::size];
    with_lanes<C>(k, K, [&](auto mask) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int lane = 0; lane < V::size; ++lane)
        square[lane] = lane < lanes ? load<C>(src + lane * lane_stride + k, mask) : V(C(0));
    });
    transpose_square<C>(square);
    const int rows = (int)(K - k < V::size ? K - k : V::size);
    for (int j = 0; j < rows; ++j) store(dst + (k + j) * dst_stride, square[j], Full{});
  }
}

// ---- without packing --------------------------------------------------------------------------------------------

// One vector of outputs of one row, out[lane] = sum_k x[k] * w[lane * lane_stride + k], from weights as they lie. Packing
// costs about as much as three products, so a call with very few rows is better off without.
template <class S>
__attribute__((noinline)) void dot_vector(int64_t K, const S* w, int64_t lane_stride, int lanes, const Compute<S>* x,
                                          Compute<S>* out) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int group = V::size < 4 ? V::size : 4;
  V square[V::size];
  for (int lane = 0; lane < V::size; lane += group) {
    V acc[2][group];
#pragma GCC unroll 4
    for (int j = 0; j < group; ++j) acc[0][j] = acc[1][j] = V(C(0));
    const S* row[group];
#pragma GCC unroll 4
    for (int j = 0; j < group; ++j) row[j] = w + (lane + j < lanes ? lane + j : 0) * lane_stride;
    auto multiply = [&](int64_t k, V(&a)[group], auto mask) __attribute__((always_inline)) {
      const V xk = load<C>(x + k, mask);
#pragma GCC unroll 4
      for (int j = 0; j < group; ++j) a[j] = a[j] + xk * load<C>(row[j] + k, mask);
    };
    int64_t k = 0;
    for (; k + 2 * V::size <= K; k += 2 * V::size) {
      multiply(k, acc[0], Full{});
      multiply(k + V::size, acc[1], Full{});
    }
    for (; k < K; k += V::size)
      with_lanes<C>(k, K, [&](auto mask) __attribute__((always_inline)) { multiply(k, acc[0], mask); });
#pragma GCC unroll 4
    for (int j = 0; j < group; ++j) square[lane + j] = acc[0][j] + acc[1][j];
  }
  transpose_square<C>(square);
  V sum = square[0];
#pragma GCC unroll 16
  for (int j = 1; j < V::size; ++j) sum = sum + square[j];
  store(out, sum, Full{});
}

}  // namespace fuseblock::FB_ISA
