// upfirdn2d of images in channels-last order whose pixels fill a vector; see upfirdn2d.h.
//
// Taps are read where they lie in the input, without padding and phases: pixels at the sides have fewer of them. A ring
// holds the input rows that the current output row needs where that saves work: filtered along x, if the filter is an outer
// product, or widened, if the storage type is narrower than the compute type. Accumulates in float (double for double).
#pragma once

#include "simd.h"
#include "upfirdn2d.h"

namespace fuseblock::FB_ISA {

using cpu::RowPhase;
using cpu::Upfirdn2dPlan;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(k, row) for the taps k and input rows of an output row: out_row down_y + k - pad_y is a multiple of up_y and inside
// of the image.
template <class F>
FB_INLINE void for_row_taps(const cpu::Upfirdn2d& a, int64_t out_row, F&& f) {
  const int64_t place = out_row * a.down_y - a.pad_y, first = (-place) % a.up_y;
  for (int64_t k = first < 0 ? first + a.up_y : first; k < a.taps_y; k += a.up_y) {
    const int64_t row = (place + k) / a.up_y;
    if (place + k >= 0 && row < a.in_h) f(k, row);
  }
}

template <class S>
struct Upfirdn2dPixels {
  using C = Compute<S>;
  using V = Vec<C>;

  const Upfirdn2dPlan& plan;
  const cpu::Upfirdn2d& a;
  C *ring, *wide;            // ring: [slot][line]; wide: an input row, where the ring holds filtered ones
  int64_t* row_in_slot;
  const C** slots;           // the row in each slot: in the ring, or where it lies in the input
  const C **rows, **filter;  // of the current output row: input rows, and the row of the filter for each
  const C** source;          // of the current pixels: product t is source[t][i] * weight[t]
  C* weight;
  int64_t image = 0;

  Upfirdn2dPixels(const Upfirdn2dPlan& p, void* scratch) : plan(p), a(p.args) {
    ring = static_cast<C*>(scratch);
    wide = ring + p.ring_rows * p.line;
    row_in_slot = reinterpret_cast<int64_t*>(wide + p.whole_line);
    slots = reinterpret_cast<const C**>(row_in_slot + p.ring_rows);
    rows = slots + p.ring_rows;
    filter = rows + p.ring_rows;
    source = filter + p.ring_rows;
    weight = reinterpret_cast<C*>(source + p.ring_rows * a.taps_x);
  }

  void start(int64_t index) {
    image = index;
    for (int64_t slot = 0; slot < plan.ring_rows; ++slot) row_in_slot[slot] = -1;
  }

  void row(int64_t out_row) {
    const bool separable = plan.row_factor != nullptr;
    const C* const weights = static_cast<const C*>(separable ? plan.column_factor : a.weights);
    const int64_t elements = a.out_w * a.channels, columns = separable ? 1 : a.taps_x;
    S* const to = static_cast<S*>(a.y) + (image * a.out_h + out_row) * elements;
    int64_t count = 0;
    for_row_taps(a, out_row, [&](int64_t k, int64_t in_row) {
      rows[count] = prepared(in_row);
      filter[count++] = weights + k * columns;
    });
    if (!separable) return filter_rows(rows, filter, count, to);
    for (int64_t t = 0; t < count; ++t) {
      source[t] = rows[t];
      weight[t] = *filter[t];
    }
    sum(count, 1, elements, 0, to, 0);
  }

  const C* prepared(int64_t row) {
    const int64_t slot = row % plan.ring_rows;
    if (row_in_slot[slot] == row) return slots[slot];
    row_in_slot[slot] = row;
    C* const held = ring + slot * plan.line;
    if (plan.row_factor == nullptr) return slots[slot] = widened(row, held);
    const C *const pixels = widened(row, wide), *const factor = static_cast<const C*>(plan.row_factor);
    filter_rows(&pixels, &factor, 1, held);
    return slots[slot] = held;
  }

  // Where the vector at element i of n begins: the last one overlaps the one before it.
  static int64_t last_whole(int64_t i, int64_t n) { return i + V::size <= n ? i : n - V::size; }

  // An input row in the compute type.
  const C* widened(int64_t row, C* to) const {
    const int64_t n = a.in_w * a.channels;
    const S* const from = static_cast<const S*>(a.x) + (image * a.in_h + row) * n;
    if constexpr (sizeof(S) == sizeof(C)) {
      return from;
    } else {
      for (int64_t i = 0; i < n; i += V::size) store(to + last_whole(i, n), load<C>(from + last_whole(i, n), Full{}), Full{});
      return to;
    }
  }

  // A row of pixels of the output: sums over the taps in these input rows.
  template <class To>
  void filter_rows(const C* const* from, const C* const* weights, int64_t count, To* to) const {
    const int64_t step = plan.phases_in, stride = plan.phases_out;
    for (int64_t r = 0; r < stride; ++r) {
      const RowPhase& phase = plan.phases[r];
      for (int64_t q = 0, many; q < phase.pixels; q += many) {
        many = q == phase.first_inside ? phase.last_inside - q : 1;
        int64_t products = 0;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t t = phase.first_tap; t < phase.last_tap; ++t) {
            const int64_t pixel = (q + plan.taps[t].offset) * step + plan.taps[t].phase;
            if (pixel < 0 || pixel >= a.in_w) continue;
            source[products] = from[i] + pixel * a.channels;
            weight[products++] = weights[i][plan.taps[t].column];
          }
        }
        sum(products, many, a.channels, step * a.channels, to + (q * stride + r) * a.channels, stride * a.channels);
      }
    }
  }

  // Sums of products: n elements of each of several pixels, whose distances are these in all sources and in the result.
  template <class To>
  void sum(int64_t products, int64_t pixels, int64_t n, int64_t from_step, To* to, int64_t to_step) const {
    const auto strip = [&](auto vectors, int64_t i, int64_t last) {
      constexpr int N = decltype(vectors)::value, P = 8 / N;  // additions that do not wait for each other
      int64_t p = 0;
      for (; p + P <= pixels; p += P) block<P, N>(products, p * from_step + i, from_step, to + p * to_step + i, to_step, last);
      for (; p < pixels; ++p) block<1, N>(products, p * from_step + i, from_step, to + p * to_step + i, to_step, last);
    };
    int64_t i = 0;
    for (; i + 8 * V::size < n; i += 8 * V::size) strip(Constant<8>{}, i, 7 * V::size);
    for (; i + 4 * V::size < n; i += 4 * V::size) strip(Constant<4>{}, i, 3 * V::size);
    const int64_t last = n - i - V::size;
    switch ((n - i + V::size - 1) / V::size) {
      case 1: return strip(Constant<1>{}, i, last);
      case 2: return strip(Constant<2>{}, i, last);
      case 3: return strip(Constant<3>{}, i, last);
      case 4: return strip(Constant<4>{}, i, last);
    }
  }

  // N vectors of each of P pixels, from element i of the sources on: consecutive, but for the last one.
  template <int P, int N, class To>
  FB_INLINE void block(int64_t products, int64_t i, int64_t from_step, To* to, int64_t to_step, int64_t last) const {
    V acc[P][N];
#define FB_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; ++i)
    FB_EACH(p, P) FB_EACH(j, N) acc[p][j] = V(C(0));
    for (int64_t t = 0; t < products; ++t) {
      const C* const from = source[t] + i;
      const V w(weight[t]);
      FB_EACH(p, P) FB_EACH(j, N) {
        acc[p][j] = acc[p][j] + w * load<C>(from + p * from_step + (j < N - 1 ? j * V::size : last), Full{});
      }
    }
    FB_EACH(p, P) FB_EACH(j, N) store(to + p * to_step + (j < N - 1 ? j * V::size : last), acc[p][j], Full{});
#undef FB_EACH
  }
};

}  // namespace fuseblock::FB_ISA
