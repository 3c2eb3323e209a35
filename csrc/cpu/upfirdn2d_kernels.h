// upfirdn2d on a range of output rows; see upfirdn2d.h.
//
// A ring holds the input rows that the current output row needs, widened, split into phases and padded with zeros, so that
// every product of the filter is a row of consecutive elements times a scalar. Reads each input row once per thread and
// writes each output row once; the ring stays in cache. Accumulates in float (double for double).
#pragma once

#include "simd.h"
#include "upfirdn2d.h"

namespace fuseblock::FB_ISA {

using cpu::RowTap;
using cpu::Upfirdn2dPlan;

template <class S>
struct Upfirdn2dRows {
  using C = Compute<S>;
  using V = Vec<C>;

  const Upfirdn2dPlan& plan;
  const cpu::Upfirdn2d& a;
  C *ring, *split_out, *whole;  // ring: [row][phase][line]; split_out: [phase][out_line]; whole: one row, not split
  C* weight;                    // of the current output row and phase: product t is source[t][i] * weight[t]
  int64_t* row_in_slot;
  const C** source;
  int64_t plane = -1, channel = 0, width = 0;  // current plane, first channel and number of channels of the chunk

  Upfirdn2dRows(const Upfirdn2dPlan& p, void* scratch) : plan(p), a(p.args) {
    ring = static_cast<C*>(scratch);
    split_out = ring + p.ring_rows * p.phases_in * p.line;
    whole = split_out + p.phases_out * p.out_line;
    row_in_slot = reinterpret_cast<int64_t*>(whole + p.whole_line);
    source = reinterpret_cast<const C**>(row_in_slot + p.ring_rows);
    weight = reinterpret_cast<C*>(source + p.ring_rows * a.taps_x);
  }

  // Starts a plane and chunk of channels. Zeros beside the pixels depend on the chunk's width alone.
  void start(int64_t chunk_index) {
    plane = chunk_index / plan.chunks;
    channel = chunk_index % plan.chunks * plan.chunk;
    const int64_t left = a.channels - channel, wide = left < plan.chunk ? left : plan.chunk;
    if (wide != width) {
      width = wide;
      __builtin_memset(ring, 0, (size_t)(plan.ring_rows * plan.phases_in * plan.line) * sizeof(C));
    }
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

  // Pixels p with 0 <= (p + first_offset) phases_in + phase < in_w.
  void pixels_inside(int64_t phase, int64_t& first, int64_t& last) const {
    const int64_t step = plan.phases_in;
    first = plan.first_offset < 0 ? -plan.first_offset : 0;
    const int64_t end = (a.in_w - phase + step - 1) / step - plan.first_offset;
    last = a.in_w <= phase ? first : end < plan.split_pixels ? end : plan.split_pixels;
    if (last < first) last = first;
  }

  // Puts an input row into its slot of the ring.
  void prepare(int64_t row) {
    C* slot = ring + row % plan.ring_rows * plan.phases_in * plan.line;
    const S* pixels = static_cast<const S*>(a.x) + (plane * a.in_h + row) * a.in_w * a.channels + channel;
    const int64_t step = plan.phases_in;
    int64_t first, last;
    if (step == 1 && width == a.channels) {
      pixels_inside(0, first, last);
      widen_row(pixels + (first + plan.first_offset) * width, slot + first * width, (last - first) * width);
      return;
    }
    if (a.channels == 1) {
      widen_row(pixels, whole, a.in_w);
      for (int64_t phase = 0; phase < step; ++phase) {
        pixels_inside(phase, first, last);
        const C* __restrict from = whole + (first + plan.first_offset) * step + phase;
        C* __restrict to = slot + phase * plan.line + first;
        const int64_t n = last - first;
        if (step == 2) for (int64_t p = 0; p < n; ++p) to[p] = from[2 * p];
        else for (int64_t p = 0; p < n; ++p) to[p] = from[step * p];
      }
      return;
    }
    for (int64_t phase = 0; phase < step; ++phase) {
      pixels_inside(phase, first, last);
      for (int64_t p = first; p < last; ++p) {
        widen_row(pixels + ((p + plan.first_offset) * step + phase) * a.channels, slot + phase * plan.line + p * width, width);
      }
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
    // Taps k of this row: (out_row down_y + k - pad_y) is a multiple of up_y and inside of the image.
    const int64_t place = out_row * a.down_y - a.pad_y;
    int64_t first_tap = (-place) % a.up_y;
    if (first_tap < 0) first_tap += a.up_y;
    const C* const filter = static_cast<const C*>(a.weights);
    S* const to = static_cast<S*>(a.y) + (plane * a.out_h + out_row) * a.out_w * a.channels + channel;
    const bool direct = plan.phases_out == 1 && width == a.channels;
    for (int64_t phase = 0; phase < plan.phases_out; ++phase) {
      int64_t products = 0;
      for (int64_t k = first_tap; k < a.taps_y; k += a.up_y) {
        const int64_t in_row = (place + k) / a.up_y;
        if (place + k < 0 || in_row >= a.in_h) continue;
        const int64_t slot = in_row % plan.ring_rows;
        if (row_in_slot[slot] != in_row) {
          prepare(in_row);
          row_in_slot[slot] = in_row;
        }
        for (int64_t t = plan.phase_taps[phase]; t < plan.phase_taps[phase + 1]; ++t) {
          const RowTap& tap = plan.taps[t];
          source[products] = ring + (slot * plan.phases_in + tap.phase) * plan.line + (tap.offset - plan.first_offset) * width;
          weight[products++] = filter[k * a.taps_x + tap.column];
        }
      }
      const int64_t pixels = (a.out_w - phase + plan.phases_out - 1) / plan.phases_out;
      if (direct) sum_row(products, pixels * width, to);
      else sum_row(products, pixels * width, split_out + phase * plan.out_line);
    }
    if (!direct) join(to);
  }

  // Writes an output row from its phases.
  void join(S* to) {
    const int64_t step = plan.phases_out;
    if (a.channels == 1) {
      C* __restrict row = whole;
      if (step == 2) {
        const C *__restrict even = split_out, *__restrict odd = split_out + plan.out_line;
        for (int64_t q = 0; q < plan.quotients; ++q) {
          row[2 * q] = even[q];
          row[2 * q + 1] = odd[q];
        }
      } else {
        for (int64_t j = 0; j < a.out_w; ++j) row[j] = split_out[j % step * plan.out_line + j / step];
      }
      narrow_row(row, to, a.out_w);
      return;
    }
    for (int64_t j = 0; j < a.out_w; ++j) {
      narrow_row(split_out + j % step * plan.out_line + j / step * width, to + j * a.channels, width);
    }
  }
};

// Output rows [begin, end), counted over planes and chunks of channels.
template <class S>
void upfirdn2d_rows(const Upfirdn2dPlan& plan, int64_t begin, int64_t end, void* scratch) {
  Upfirdn2dRows<S> rows(plan, scratch);
  const int64_t out_h = plan.args.out_h;
  for (int64_t r = begin; r < end; ++r) {
    if (r == begin || r % out_h == 0) rows.start(r / out_h);
    rows.row(r % out_h);
  }
}

}  // namespace fuseblock::FB_ISA
