// What an instruction set offers: one table of kernels per set, filled in isa_*.cpp and chosen at run time.
#pragma once

#include "bias_act.h"
#include "lstm_gates.h"
#include "lstm_layer.h"
#include "lstm_recurrence.h"
#include "upfirdn2d.h"

namespace fuseblock::cpu {

struct KernelTable {
  const char* isa;
  int vector_bytes;
  // Rows [begin, end).
  void (*gates_fwd)(const GatesFwd&, int64_t begin, int64_t end);
  void (*gates_bwd)(const GatesBwdArgs&, int64_t begin, int64_t end);
  void (*gates_bwd_bwd)(const GatesBwdBwdArgs&, int64_t begin, int64_t end);

  // Blocks [begin, end) of a packed matrix, and what one thread computes of a sweep.
  void (*pack)(const PackedMatrix&, DType, int64_t begin, int64_t end);
  void (*recurrence_fwd)(const RecurrenceFwd&, const Part&);
  void (*recurrence_bwd)(const RecurrenceBwd&, const Part&);
  void (*recurrence_bwd_bwd)(const RecurrenceBwdBwd&, const Part&);

  // Whole layers: blocks [begin, end) of a direction's packed weights, what one thread computes, and rows or elements
  // [begin, end) of what is added up at the end.
  void (*layer_pack)(const Layer&, int64_t direction, void* packed, int64_t begin, int64_t end);
  void (*layer_fwd)(const LayerFwd&, const LayerWorker&);
  void (*layer_bwd)(const LayerBwd&, const LayerWorker&);
  void (*layer_finish)(const LayerBwd&, int64_t direction, const void* first, int64_t workers, int64_t distance,
                       int64_t begin, int64_t end);
  void (*layer_add_dx)(const LayerBwd&, int64_t begin, int64_t end);

  // Output rows [begin, end), counted over groups of planes and chunks of channels; scratch of plan.scratch_bytes.
  void (*upfirdn2d)(const Upfirdn2dPlan&, int64_t begin, int64_t end, void* scratch);

  // Elements [begin, end), begin a multiple of 8 where a mask is written. sums: two a channel, added to; scratch: two
  // values of the compute type for each place of the site's period.
  void (*bias_act_fwd)(const BiasActFwd&, int64_t begin, int64_t end);
  void (*bias_act_bwd)(const BiasActBwdArgs&, int64_t begin, int64_t end, double* sums, void* scratch);
  void (*bias_act_bwd_bwd)(const BiasActBwdBwdArgs&, int64_t begin, int64_t end, double* sums, void* scratch);
};

// The best set that this machine has, or the one that FUSEBLOCK_CPU_ISA (baseline|avx2|avx512) names; null if that
// name is unknown or the machine lacks it.
const KernelTable* kernel_table();

}  // namespace fuseblock::cpu
