// Arguments of the lstm_gates CPU kernels. Equations: csrc/math/lstm_gates.h. All tensors are contiguous: `gates`-like
// (rows, 4H) pre-activations in the storage type, `c`-like (rows, H) in c's type, h-like (rows, H) in the storage type.
// Null cotangents are zeros.
#pragma once

#include "storage.h"
#include "threads.h"

namespace fuseblock::cpu {

struct GatesShape {
  int64_t rows, H;
  DType dtype;     // of gates and h
  bool c_storage;  // c has `dtype`; otherwise it has the compute type (differs for 16-bit only)
};

struct GatesFwd {
  GatesShape shape;
  const void *gates, *c;
  void *h, *c_new;
};

struct GatesBwdArgs {
  GatesShape shape;
  const void *dh, *dc_new, *gates, *c;
  void *dgates, *dc;
};

struct GatesBwdBwdArgs {
  GatesShape shape;
  const void *v_dgates, *v_dc, *dh, *dc_new, *gates, *c;
  void *a_dh, *a_dc_new, *a_gates, *a_c;
};

void lstm_gates(const GatesFwd&, const Threads&);
void lstm_gates_bwd(const GatesBwdArgs&, const Threads&);
void lstm_gates_bwd_bwd(const GatesBwdBwdArgs&, const Threads&);

}  // namespace fuseblock::cpu
