// Forward pass of a whole layer over one thread's rows; see lstm_layer.h.
//
// A row of scratch is z = [x, 1, h], so that the pre-activations are one product with [W_ih | b | W_hh]. Where a step
// has fewer rows than a tile, the products with [x, 1] are done for many steps at once, and each step adds those with h.
// Per step and row: reads I x, writes H y and, if saved, 4H activated gates and H c. z holds the compute type; h in it is
// rounded to the storage type.
#pragma once

#include "lstm_layer.h"
#include "sweep.h"

namespace fuseblock::FB_ISA {

// Blocks [begin, end) of [W_ih | b | W_hh] in the gates layout.
template <class S>
void layer_pack(const cpu::Layer& l, int64_t direction, void* packed, int64_t begin, int64_t end) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t H = l.layout.H, I = l.I, Z = I + 1 + H;
  const cpu::LayerWeights& w = l.weights[direction];
  const S *ih = static_cast<const S*>(w.ih), *hh = static_cast<const S*>(w.hh);
  for (int64_t b = begin; b < end; ++b)
    for (int64_t gate = 0; gate < 4; ++gate) {
      const int64_t unit = b * V::size, row = gate * H + unit, stride = 4 * V::size;
      const int lanes = (int)(H - unit < V::size ? H - unit : V::size);
      C* const dst = static_cast<C*>(packed) + b * Z * stride + gate * V::size;
      pack_transposed<S>(dst, stride, ih + row * I, I, lanes, I);
      const V bias = load_or_zero<C>(at<S>(w.b_ih, row), Tail{lanes}) + load_or_zero<C>(at<S>(w.b_hh, row), Tail{lanes});
      store(dst + I * stride, bias, Full{});
      pack_transposed<S>(dst + (I + 1) * stride, stride, hh + row * H, H, lanes, H);
    }
}

// Row k of x at time t.
template <class S>
FB_INLINE const S* layer_input_rows(const cpu::Layer& l, int64_t t, int64_t k) {
  const int64_t start = l.layout.start ? l.layout.start[t] * l.x.row : t * l.x.time;
  return static_cast<const S*>(l.x.data) + start + k * l.x.row;
}

// part: rows of one direction, at most kLayerRows.
template <class S>
void layer_fwd_rows(const cpu::LayerFwd& a, const Part& part, const Compute<S>* packed, Compute<S>* scratch) {
  using C = Compute<S>;
  using V = Vec<C>;
  const Layout& layout = a.layer.layout;
  const Sweep<S> sweep(layout, part);
  const int64_t H = layout.H, I = a.layer.I, X = I + 1, Z = X + H, rows = sweep.rows, wide = 4 * V::size;
  const bool ahead = rows < kTileRows;
  const int64_t most = ahead ? cpu::kLayerRows / rows : 1, steps = most < layout.T ? most : layout.T;
  C* const z = scratch;                                 // (steps + 1, rows, Z)
  C* const projected = z + (steps + 1) * rows * Z;      // (vectors of units, steps * rows, 4 vectors)
  __builtin_memset(z, 0, (steps + 1) * rows * Z * sizeof(C));

  const auto h0 = sweep.template state<const S>(a.h0, H);
  const auto h_n = sweep.template state<S>(a.h_n, H);
  const auto c_carry = sweep.template state<C>(a.c_n, H);
  const auto c0 = sweep.template state<const C>(a.c0, H);
  for (int64_t k = 0; k < rows; ++k) sweep.copy(c_carry(k, 0), c0(k, 0), H);

  // The products with [x, 1] of the `count` steps from t on.
  const auto load_inputs = [&](int64_t t, int64_t count) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t time = part.direction == 0 ? t + s : t - s, active = sweep.active_at(time);
      const S* row = layer_input_rows<S>(a.layer, time, part.k0);
      C* to = z + s * rows * Z;
      for (int64_t k = 0; k < active; ++k, row += a.layer.x.row, to += Z) {
        sweep.copy(to, row, I);
        to[I] = C(1);
      }
    }
    if (!ahead) return;
    for (int64_t u = 0, b = 0; u < H; u += V::size, ++b) {
      const RowTiles tiles(0, count * rows);
      int64_t row = 0;
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int n = (int)(tiles.rows + (i < tiles.larger));
        tile_fn<C>(n, 4)(X, packed + b * Z * wide, z + row * Z, Z, projected + (b * steps * rows + row) * wide);
        row += n;
      }
    }
  };

  int64_t slot = steps, done = 0;
  sweep.steps(true, [&](const Step& step) __attribute__((always_inline)) {
    if (slot == steps) {
      if (done > 0)
        for (int64_t k = 0; k < rows; ++k) sweep.copy(z + k * Z + X, z + (steps * rows + k) * Z + X, H);
      load_inputs(step.t, layout.T - done < steps ? layout.T - done : steps);
      slot = 0;
    }
    C *const now = z + slot * rows * Z, *const next = now + rows * Z + X;
    for (int64_t k = step.joined; k < step.active; ++k) sweep.copy(now + k * Z + X, h0(k, 0), H);

    const auto y = sweep.template at<S>(a.y, step.t, H);
    const auto gates = sweep.template at<S>(a.gates, step.t, 4 * H);
    const auto c_out = sweep.template at<C>(a.c, step.t, H);
    const int64_t first = ahead ? X : 0, leaving = step.leaving;
    const RowTiles tiles(0, step.active);
    for (int64_t u = 0, b = 0; u < H; u += V::size, ++b) {
      const C* const w = packed + (b * Z + first) * wide;
      const C* const in = ahead ? projected + (b * steps + slot) * rows * wide : nullptr;
      const auto product = [&](int n, const C* x, C* tile) __attribute__((always_inline)) {
        tile_fn<C>(n, 4)(Z - first, w, x, Z, tile);
      };
      for_tiles<C>(now + first, Z, tiles, product, [&](C* tile, int64_t row, int n) __attribute__((always_inline)) {
        with_lanes<C>(u, H, [&](auto lanes) __attribute__((always_inline)) {
          for (int r = 0; r < n; ++r) {
            const int64_t k = row + r;
            Gates<V> sum = load_gates<V>(tile + r * wide, V::size, Full{});
            if (in) {
              const Gates<V> x = load_gates<V>(in + k * wide, V::size, Full{});
              sum = {sum.i + x.i, sum.f + x.f, sum.g + x.g, sum.o + x.o};
            }
            const Gates<V> s = activate_gates(sum);
            C* const c = c_carry(k, u);
            const V c_new = s.f * load<C>(c, lanes) + s.i * s.g;
            store(c, c_new, lanes);
            if (gates) {
              store_gates(gates(k, u), H, s, lanes);
              store(c_out(k, u), c_new, lanes);
            }
            V h = s.o * tanh_of(c_new);
            store(y(k, u), h, lanes);
            if constexpr (sizeof(S) != sizeof(C)) h = load<C>(y(k, u), lanes);
            store(next + k * Z + u, h, lanes);
            if (k >= leaving) store(h_n(k, u), h, lanes);
          }
        });
      });
    }
    ++slot, ++done;
  });
}

// Calls f(part) for blocks of a worker's rows that fit into its scratch.
template <class F>
FB_INLINE void for_row_blocks(const cpu::LayerWorker& w, F&& f) {
  const int64_t rows = w.k1 - w.k0, blocks = (rows + cpu::kLayerRows - 1) / cpu::kLayerRows;
  for (int64_t b = 0; b < blocks; ++b)
    f(Part{w.direction, w.k0 + rows * b / blocks, w.k0 + rows * (b + 1) / blocks, 0, 1, nullptr, nullptr, {}, {}});
}

template <class S>
void layer_fwd(const cpu::LayerFwd& a, const cpu::LayerWorker& w) {
  using C = Compute<S>;
  for_row_blocks(w, [&](const Part& part) {
    layer_fwd_rows<S>(a, part, static_cast<const C*>(w.gates_matrix), static_cast<C*>(w.scratch));
  });
}

}  // namespace fuseblock::FB_ISA
