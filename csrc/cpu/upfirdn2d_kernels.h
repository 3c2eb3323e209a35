// upfirdn2d on a range of output rows; see upfirdn2d.h. Where pixels fill a vector: upfirdn2d_pixels.h.
//
// A ring holds the input rows that the current output row needs, widened, split into phases and padded with zeros, so that
// every product of the filter is a row of consecutive elements times a scalar. Reads each input row once per thread and
// writes each output row once; the ring stays in cache. Accumulates in float (double for double).
#pragma once

#include "simd.h"
#include "upfirdn2d.h"
#include "upfirdn2d_pixels.h"

namespace fuseblock::FB_ISA {

using cpu::RowTap;
using cpu::Upfirdn2dPlan;

template <class S>
struct Upfirdn2dRows {
  using C = Compute<S>;
  using V = Vec<C>;

  const Upfirdn2dPlan& plan;
  const cpu::Upfirdn2d& a;
  C *ring, *split_out;       // ring: [row][phase][line]; split_out: [phase][line]
  C *whole_in, *whole_out;   // [line], not split; for channels = 1
  C* weight;                 // of the current output row and phase: product t is source[t][i] * weight[t]
  int64_t* row_in_slot;
  const C** source;
  int64_t plane = -1, count = 0;  // current planes: the first, and how many

  Upfirdn2dRows(const Upfirdn2dPlan& p, void* scratch) : plan(p), a(p.args) {
    ring = static_cast<C*>(scratch);
    split_out = ring + p.ring_rows * p.phases_in * p.line;
    whole_in = split_out + p.phases_out * p.line;
    whole_out = whole_in + p.whole_line;
    row_in_slot = reinterpret_cast<int64_t*>(whole_out + p.whole_line);
    source = reinterpret_cast<const C**>(row_in_slot + p.ring_rows);
    weight = reinterpret_cast<C*>(source + p.ring_rows * a.taps_x);
    // Zeros stay beside the pixels of every row.
    __builtin_memset(ring, 0, (size_t)(p.ring_rows * p.phases_in * p.line) * sizeof(C));
    __builtin_memset(whole_in, 0, (size_t)p.whole_line * sizeof(C));
  }

  // Starts a group of planes.
  void start(int64_t index) {
    plane = index * plan.group;
    count = a.planes - plane < plan.group ? a.planes - plane : plan.group;
    for (int64_t slot = 0; slot < plan.ring_rows; ++slot) row_in_slot[slot] = -1;
  }

  // n elements, widened.
  static void widen_row(const S* from, C* to, int64_t n) {
    int64_t i = 0;
    for (; i + V::size <= n; i += V::size) store(to + i, load<C>(from + i, Full{}), Full{});
    if (i < n) store(to + i, load<C>(from + i, Tail{(int)(n - i)}), Tail{(int)(n - i)});
  }

  static void narrow_row(const C* from, S* to, int64_t n) {
    int64_t i = 0;
    for (; i + V::size <= n; i += V::size) store(to + i, load<C>(from + i, Full{}), Full{});
    if (i < n) store(to + i, load<C>(from + i, Tail{(int)(n - i)}), Tail{(int)(n - i)});
  }

  // Input columns first <= j < last that split rows hold.
  void columns_held(int64_t& first, int64_t& last) const {
    const int64_t begin = plan.first_offset * plan.phases_in, end = begin + plan.split_pixels * plan.phases_in;
    first = begin > 0 ? begin : 0;
    last = end < a.in_w ? end : a.in_w;
    if (last < first) last = first;
  }

  // Puts an input row into its slot of the ring.
  void prepare(int64_t row) {
    C* const slot = ring + row % plan.ring_rows * plan.phases_in * plan.line;
    const S* const pixels = static_cast<const S*>(a.x) + (plane * a.in_h + row) * a.in_w * a.channels;
    const int64_t step = plan.phases_in, begin = plan.first_offset * step;
    int64_t first, last;
    columns_held(first, last);
    if (a.channels == 1) {
      C* const held = step == 1 ? slot : whole_in;
      for (int64_t p = 0; p < count; ++p) {
        widen_row(pixels + p * a.in_h * a.in_w + first, held + p * plan.split_pixels * step + first - begin, last - first);
      }
      if (step > 1) split(whole_in, slot, count * plan.split_pixels);
    } else if (step == 1) {
      widen_row(pixels + first * a.channels, slot + (first - begin) * a.channels, (last - first) * a.channels);
    } else {
      for (int64_t j = first; j < last; ++j) {
        const int64_t at = j - begin;
        widen_row(pixels + j * a.channels, slot + at % step * plan.line + at / step * a.channels, a.channels);
      }
    }
  }

  // n pixels of every phase.
  void split(const C* __restrict from, C* __restrict slot, int64_t n) const {
    const int64_t step = plan.phases_in;
    for (int64_t phase = 0; phase < step; ++phase) {
      C* __restrict to = slot + phase * plan.line;
      if (step == 2) for (int64_t i = 0; i < n; ++i) to[i] = from[2 * i + phase];
      else for (int64_t i = 0; i < n; ++i) to[i] = from[step * i + phase];
    }
  }

  // N vectors of the sum of all products, from element i on; the last of them has these lanes.
  template <int N, class To, class Lanes>
  FB_INLINE void sum(int64_t products, int64_t i, To* to, Lanes lanes) const {
    V acc[N];
#define FB_EACH(N) _Pragma("GCC unroll 8") for (int j = 0; j < N; ++j)
    FB_EACH(N) acc[j] = V(C(0));
    for (int64_t t = 0; t < products; ++t) {
      const C* from = source[t] + i;
      const V w(weight[t]);
      FB_EACH(N) acc[j] = acc[j] + w * load<C>(from + j * V::size, Full{});
    }
    FB_EACH(N - 1) store(to + i + j * V::size, acc[j], Full{});
    store(to + i + (N - 1) * V::size, acc[N - 1], lanes);
#undef FB_EACH
  }

  // Several vectors at a time: their additions do not wait for each other.
  template <class To>
  void sum_row(int64_t products, int64_t n, To* to) const {
    constexpr int64_t size = V::size;
    int64_t i = 0;
    for (; i + 8 * size < n; i += 8 * size) sum<8>(products, i, to, Full{});
    if (i + 4 * size < n) {
      sum<4>(products, i, to, Full{});
      i += 4 * size;
    }
    with_last_lanes(n, [&](auto lanes) __attribute__((always_inline)) {
      switch ((n - i + size - 1) / size) {
        case 1: return sum<1>(products, i, to, lanes);
        case 2: return sum<2>(products, i, to, lanes);
        case 3: return sum<3>(products, i, to, lanes);
        case 4: return sum<4>(products, i, to, lanes);
      }
    });
  }

  // Calls f with the lanes of the last vector of n elements.
  template <class F>
  static FB_INLINE void with_last_lanes(int64_t n, F&& f) {
    const int rest = (int)(n % V::size);
    if (rest == 0) f(Full{});
    else f(Tail{rest});
  }

  void row(int64_t out_row) {
    const C* const filter = static_cast<const C*>(a.weights);
    S* const to = static_cast<S*>(a.y) + (plane * a.out_h + out_row) * a.out_w * a.channels;
    const bool direct = plan.phases_out == 1 && plan.group == 1;
    for (int64_t phase = 0; phase < plan.phases_out; ++phase) {
      int64_t products = 0;
      for_row_taps(a, out_row, [&](int64_t k, int64_t in_row) {
        const int64_t slot = in_row % plan.ring_rows;
        if (row_in_slot[slot] != in_row) {
          prepare(in_row);
          row_in_slot[slot] = in_row;
        }
        for (int64_t t = plan.phases[phase].first_tap; t < plan.phases[phase].last_tap; ++t) {
          const RowTap& tap = plan.taps[t];
          source[products] = ring + (slot * plan.phases_in + tap.phase) * plan.line + (tap.offset - plan.first_offset) * a.channels;
          weight[products++] = filter[k * a.taps_x + tap.column];
        }
      });
      const int64_t elements = ((count - 1) * plan.split_pixels + plan.quotients) * a.channels;
      if (direct) sum_row(products, elements, to);
      else sum_row(products, elements, split_out + phase * plan.line);
    }
    if (!direct) join(to);
  }

  // Writes an output row from its phases.
  void join(S* to) {
    const int64_t step = plan.phases_out;
    if (a.channels > 1) {
      for (int64_t j = 0; j < a.out_w; ++j) {
        narrow_row(split_out + j % step * plan.line + j / step * a.channels, to + j * a.channels, a.channels);
      }
      return;
    }
    const int64_t n = count * plan.split_pixels;
    C* __restrict row = whole_out;
    if (step == 1) {
      row = split_out;
    } else if (step == 2) {
      const C *__restrict even = split_out, *__restrict odd = split_out + plan.line;
      for (int64_t i = 0; i < n; ++i) {
        row[2 * i] = even[i];
        row[2 * i + 1] = odd[i];
      }
    } else {
      for (int64_t phase = 0; phase < step; ++phase) {
        for (int64_t i = 0; i < n; ++i) row[step * i + phase] = split_out[phase * plan.line + i];
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      narrow_row(row + p * plan.split_pixels * step, to + p * a.out_h * a.out_w, a.out_w);
    }
  }
};

// Output rows [begin, end), counted over groups of planes.
template <class S>
void upfirdn2d_rows(const Upfirdn2dPlan& plan, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto rows) {
    const int64_t out_h = plan.args.out_h;
    for (int64_t r = begin; r < end; ++r) {
      if (r == begin || r % out_h == 0) rows.start(r / out_h);
      rows.row(r % out_h);
    }
  };
  if (plan.by_pixel) run(Upfirdn2dPixels<S>(plan, scratch));
  else run(Upfirdn2dRows<S>(plan, scratch));
}

}  // namespace fuseblock::FB_ISA
