// Arguments of a whole LSTM layer on the CPU: input projection and recurrence in one pass over the steps, and in the
// backward pass the gradients of input and weights too. Equations: lstm_recurrence.h with gx = x W_ih^T + b_ih + b_hh.
//
// Neither gx nor the gradient of the pre-activations (4H values per row and step) ever reaches memory: threads own
// rows, and work on a few steps at a time in scratch that stays in their cache. No projection, no `lengths`.
#pragma once

#include "lstm_recurrence.h"

namespace fuseblock::cpu {

struct LayerWeights {  // of one direction, contiguous
  const void *ih, *hh;      // (4H, I), (4H, H)
  const void *b_ih, *b_hh;  // (4H,) or null
};

struct Layer {
  Layout layout;
  int64_t I;
  Series x;  // rows of I values, one for both directions
  LayerWeights weights[2];
};

struct LayerFwd {
  Layer layer;
  const void *h0, *c0;
  Series y, gates, c;  // gates and c may be absent
  void *h_n, *c_n;
};

struct LayerBwd {
  Layer layer;
  Series dy;
  const void *dh_n, *dc_n;
  Series y, gates, c;
  const void *h0, *c0;
  void* dx;           // (rows, I) contiguous; may be absent
  void *dh0, *dc0;
  void *dw_ih[2], *dw_hh[2], *db[2];  // of each direction; db may be absent
  void* dx_reverse;   // scratch of the second direction: (rows, I) in the state type
};

// What one thread computes: rows k0 <= k < k1 of a direction.
struct LayerWorker {
  int64_t direction, k0, k1;
  const void* gates_matrix;       // fwd: [W_ih | b | W_hh], packed in the gates layout; K = I + 1 + H
  PackedMatrix hidden, input;     // bwd: W_hh and W_ih transposed, flat
  void* scratch;
  void* sums;                     // bwd: (4H, I + H, padded) and then (4H,) for the biases
};

// Rows that a thread works on at a time: a whole number of steps of up to this many rows.
constexpr int64_t kLayerRows = 96;

// Row stride of `sums`, in elements.
inline int64_t layer_sums_stride(const Layer& l, int64_t lanes) { return (l.I + l.layout.H + lanes - 1) / lanes * lanes; }

// Whether the weights, packed, and a thread's sums stay in a core's cache.
bool lstm_layer_fits(int64_t input, int64_t hidden);

void lstm_layer(const LayerFwd&, const Threads&);
void lstm_layer_bwd(const LayerBwd&, const Threads&);

}  // namespace fuseblock::cpu
