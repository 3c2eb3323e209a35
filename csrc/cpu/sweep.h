// What the three sweeps of the recurrence share: addresses of rows, the walk over the steps, and a thread's share of
// the output blocks. See lstm_recurrence.h for the layout of rows.
#pragma once

#include "gates_kernels.h"
#include "lstm_recurrence.h"
#include "tile_gemm.h"

namespace fuseblock::FB_ISA {

using cpu::Layout;
using cpu::PackedMatrix;
using cpu::Part;
using cpu::Series;

// One step of a sweep. Rows are numbered within the part: [0, active) run, of which [joined, active) run for the first
// time and [leaving, active) for the last.
struct Step {
  int64_t t, previous;  // time of this step and of the one processed before it in *forward* order (-1 or T: none)
  int64_t active, joined, leaving;
  int64_t carried;      // rows below it find their previous cell state at `previous`, the others in c0
  int64_t read, write;  // halves of the double-buffered carry
};

struct Range {
  int64_t begin, end;
};

inline int64_t first_vector(const PackedMatrix& m, int64_t block) {
  return m.blocks == m.vectors ? block : m.vectors * block / m.blocks;
}

// Where vector v of the block that starts at vector `first` lies in the source, and how many of its lanes exist.
struct VectorSource {
  int64_t offset;
  int lanes;
};
inline VectorSource vector_source(const PackedMatrix& m, int64_t first, int64_t v, int64_t lanes) {
  const int64_t unit = (m.gates ? first : first + v) * lanes, left = m.outputs - unit;
  const int64_t row = m.gates ? v * m.outputs + unit : unit;
  return {row * m.output_stride, (int)(left < lanes ? left : lanes)};
}

inline Range share(int64_t n, int64_t member, int64_t members) {
  return {n * member / members, n * (member + 1) / members};
}

// Element (row k, j) of a tensor whose rows lie in place or, if `order` is given, permuted; null if it is absent.
template <class E>
struct RowsAt {
  E* base;
  int64_t stride;
  const int64_t* order;

  FB_INLINE E* operator()(int64_t k, int64_t j) const {
    return base ? base + (order ? order[k] : k) * stride + j : nullptr;
  }
  explicit operator bool() const { return base != nullptr; }
};

template <class S>
struct Sweep {
  using C = Compute<S>;
  using V = Vec<C>;
  const Layout& layout;
  const Part& part;
  int64_t rows;

  Sweep(const Layout& l, const Part& p) : layout(l), part(p), rows(p.k1 - p.k0) {}

  template <class E>
  FB_INLINE RowsAt<E> rows_from(E* data, int64_t offset, int64_t stride) const {
    if (!data) return {nullptr, 0, nullptr};
    if (layout.order) return {data + offset, stride, layout.order + part.k0};
    return {data + offset + part.k0 * stride, stride, nullptr};
  }

  int64_t active_at(int64_t t) const {
    const int64_t n = (layout.active ? layout.active[t] : layout.B) - part.k0;
    return n < 0 ? 0 : n > rows ? rows : n;
  }

  // The rows of a series at time t; `width` elements per direction.
  template <class E>
  FB_INLINE RowsAt<E> at(const Series& s, int64_t t, int64_t width) const {
    const int64_t time = layout.start ? layout.start[t] * s.row : t * s.time;
    return rows_from(static_cast<E*>(s.data), time + part.direction * width, s.row);
  }

  // The rows of a (D, B, width) state.
  template <class E>
  FB_INLINE RowsAt<E> state(const void* p, int64_t width) const {
    return rows_from(static_cast<E*>(const_cast<void*>(p)), part.direction * layout.B * width, width);
  }

  void wait() const {
    if (part.members > 1) cpu::barrier_wait(part.barrier);
  }

  Range blocks(const PackedMatrix& m) const {
    return part.members == 1 ? Range{0, m.blocks} : share(m.blocks, part.member, part.members);
  }
  // The outputs (units) that this thread's blocks hold.
  Range outputs(const PackedMatrix& m) const {
    const Range b = blocks(m);
    const int64_t lanes = V::size, end = first_vector(m, b.end) * lanes;
    return {first_vector(m, b.begin) * lanes, end < m.outputs ? end : m.outputs};
  }

  // The cell states that a step started from: rows from `carried` on find theirs in c0.
  struct PreviousC {
    RowsAt<const C> stored, initial;
    int64_t carried;
    FB_INLINE const C* operator()(int64_t k, int64_t j) const { return k < carried ? stored(k, j) : initial(k, j); }
  };
  FB_INLINE PreviousC previous_c(const Series& c, const void* c0, const Step& step) const {
    const int64_t H = layout.H;
    return {step.carried ? at<const C>(c, step.previous, H) : RowsAt<const C>{}, state<const C>(c0, H), step.carried};
  }

  // Calls f(step) for every time step; `forward` means the direction's own order, else its reverse.
  template <class F>
  FB_INLINE void steps(bool forward, F&& f) const {
    const bool ascending = forward == (part.direction == 0);
    const int64_t T = layout.T, back = part.direction == 0 ? -1 : 1;
    int64_t before = 0;
    for (int64_t s = 0; s < T; ++s) {
      const int64_t t = ascending ? s : T - 1 - s, active = active_at(t);
      const int64_t after = s + 1 < T ? active_at(ascending ? t + 1 : t - 1) : 0;
      const int64_t previous = t + back, joined = before < active ? before : active;
      const int64_t carried = previous < 0 || previous >= T ? 0 : layout.start ? active_at(previous) : rows;
      f(Step{t, previous, active, joined, after < active ? after : active, carried, s & 1, 1 - (s & 1)});
      before = active;
    }
  }

  // Rows [begin, end) of x times this thread's blocks of m; f(tile, vecs, row, lanes-unit u of the block, rows).
  template <class F>
  FB_INLINE void multiply(const PackedMatrix& m, const C* x, int64_t K, int64_t begin, int64_t end, F&& f) const {
    const Range mine = blocks(m);
    const RowTiles tiles(begin, end);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t vector = first_vector(m, b);
      const int vecs = m.gates ? 4 : (int)(first_vector(m, b + 1) - vector);
      const auto product = [&](int n, const C* rows_of_x, C* tile) __attribute__((always_inline)) {
        if (!m.packed) return dot_tile(m, vector, vecs, n, K, rows_of_x, tile);
        const C* w = static_cast<const C*>(m.packed) + vector * (m.gates ? 4 : 1) * m.K * V::size;
        tile_fn<C>(n, vecs)(K, w, rows_of_x, m.K, tile);
      };
      for_tiles<C>(x, m.K, tiles, product, [&](C* tile, int64_t row, int n) __attribute__((always_inline)) {
        f(tile, vecs, row, vector * V::size, n);
      });
    }
  }

  // The product of `multiply` from a source with adjacent terms (k_stride 1), unpacked.
  static void dot_tile(const PackedMatrix& m, int64_t vector, int vecs, int n, int64_t K, const C* x, C* tile) {
    for (int v = 0; v < vecs; ++v) {
      const VectorSource source = vector_source(m, vector, v, V::size);
      const S* w = static_cast<const S*>(m.source) + source.offset;
      for (int r = 0; r < n; ++r)
        dot_vector<S>(K, w, m.output_stride, source.lanes, x + r * m.K, tile + (r * vecs + v) * V::size);
    }
  }

  // The same for a flat matrix, vector by vector: f(sum, row, unit, lanes).
  template <class F>
  FB_INLINE void multiply_flat(const PackedMatrix& m, const C* x, int64_t K, int64_t begin, int64_t end, F&& f) const {
    multiply(m, x, K, begin, end,
             [&](C* tile, int vecs, int64_t row, int64_t u0, int n) __attribute__((always_inline)) {
      for (int r = 0; r < n; ++r)
        for (int v = 0; v < vecs; ++v) {
          const V sum = load<C>(tile + (r * vecs + v) * V::size, Full{});
          const int64_t u = u0 + v * V::size;
          with_lanes<C>(u, m.outputs, [&](auto lanes) __attribute__((always_inline)) { f(sum, row + r, u, lanes); });
        }
    });
  }

  // Padded sequences have storage behind the end of a row.
  bool has_inactive_rows() const { return layout.active && !layout.start; }

  // Element-wise copy of a state row, converting between storage and state type; absent sources are zeros.
  template <class To, class From>
  static void copy(To* to, const From* from, int64_t n) {
    for (int64_t u = 0; u < n; u += V::size)
      with_lanes<C>(u, n, [&](auto lanes) __attribute__((always_inline)) {
        store(to + u, load_or_zero<C>(from ? from + u : nullptr, lanes), lanes);
      });
  }

  // Zeros in units [r.begin, r.end) of a row; `gates` of them follow one another at distance H.
  template <class E>
  static void clear(E* row, Range r, int64_t gates = 1, int64_t H = 0) {
    if (row)
      for (int64_t g = 0; g < gates; ++g) __builtin_memset(row + g * H + r.begin, 0, (r.end - r.begin) * sizeof(E));
  }
};

// Blocks [begin, end) of a matrix into the layout of tile_gemm.h.
template <class S>
void pack(const PackedMatrix& m, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* source = static_cast<const S*>(m.source);
  const auto block = [&](int64_t b) {
    return static_cast<C*>(m.packed) + first_vector(m, b) * (m.gates ? 4 : 1) * m.K * V::size;
  };
  const auto vecs_of = [&](int64_t b) { return m.gates ? 4 : first_vector(m, b + 1) - first_vector(m, b); };
  if (m.k_stride == 1) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t v = 0, vecs = vecs_of(b); v < vecs; ++v) {
        const VectorSource from = vector_source(m, first_vector(m, b), v, V::size);
        pack_transposed<S>(block(b) + v * V::size, vecs * V::size, source + from.offset, m.output_stride, from.lanes, m.K);
      }
    return;
  }
  for (int64_t k = 0; k < m.K; ++k) {  // the source is read as it lies, row by row
    const S* row = source + k * m.k_stride;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = first_vector(m, b), vecs = vecs_of(b);
      C* dst = block(b) + k * vecs * V::size;
      for (int64_t v = 0; v < vecs; ++v)
        with_lanes<C>((first + v) * V::size, m.outputs, [&](auto lanes) __attribute__((always_inline)) {
          store(dst + v * V::size, load<C>(row + (first + v) * V::size, lanes), Full{});
        });
    }
  }
}

}  // namespace fuseblock::FB_ISA
