// The kernel table of one instruction set; see kernel_table.h.
#pragma once

#include "bias_act_kernels.h"
#include "kernel_table.h"
#include "layer_bwd.h"
#include "layer_fwd.h"
#include "recurrence_bwd.h"
#include "recurrence_bwd_bwd.h"
#include "recurrence_fwd.h"
#include "upfirdn2d_kernels.h"

namespace fuseblock::FB_ISA {

// Calls f with a value of the storage type.
template <class F>
FB_INLINE void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
  }
}

inline void gates_fwd_any(const cpu::GatesFwd& a, int64_t begin, int64_t end) {
  for_gates_types(a.shape, [&](auto kernels) { kernels.fwd(a, begin, end); });
}
inline void gates_bwd_any(const cpu::GatesBwdArgs& a, int64_t begin, int64_t end) {
  for_gates_types(a.shape, [&](auto kernels) { kernels.bwd(a, begin, end); });
}
inline void gates_bwd_bwd_any(const cpu::GatesBwdBwdArgs& a, int64_t begin, int64_t end) {
  for_gates_types(a.shape, [&](auto kernels) { kernels.bwd_bwd(a, begin, end); });
}
inline void pack_any(const PackedMatrix& m, DType dtype, int64_t begin, int64_t end) {
  for_dtype(dtype, [&](auto s) { pack<decltype(s)>(m, begin, end); });
}
inline void recurrence_fwd_any(const cpu::RecurrenceFwd& a, const Part& part) {
  for_dtype(a.layout.dtype, [&](auto s) { recurrence_fwd<decltype(s)>(a, part); });
}
inline void recurrence_bwd_any(const cpu::RecurrenceBwd& a, const Part& part) {
  for_dtype(a.layout.dtype, [&](auto s) { recurrence_bwd<decltype(s)>(a, part); });
}
inline void recurrence_bwd_bwd_any(const cpu::RecurrenceBwdBwd& a, const Part& part) {
  for_dtype(a.layout.dtype, [&](auto s) { recurrence_bwd_bwd<decltype(s)>(a, part); });
}

inline void layer_pack_any(const cpu::Layer& l, int64_t direction, void* packed, int64_t begin, int64_t end) {
  for_dtype(l.layout.dtype, [&](auto s) { layer_pack<decltype(s)>(l, direction, packed, begin, end); });
}
inline void layer_fwd_any(const cpu::LayerFwd& a, const cpu::LayerWorker& w) {
  for_dtype(a.layer.layout.dtype, [&](auto s) { layer_fwd<decltype(s)>(a, w); });
}
inline void layer_bwd_any(const cpu::LayerBwd& a, const cpu::LayerWorker& w) {
  for_dtype(a.layer.layout.dtype, [&](auto s) { layer_bwd<decltype(s)>(a, w); });
}
inline void layer_finish_any(const cpu::LayerBwd& a, int64_t direction, const void* first, int64_t workers,
                             int64_t distance, int64_t begin, int64_t end) {
  for_dtype(a.layer.layout.dtype,
            [&](auto s) { layer_finish<decltype(s)>(a, direction, first, workers, distance, begin, end); });
}
inline void layer_add_dx_any(const cpu::LayerBwd& a, int64_t begin, int64_t end) {
  for_dtype(a.layer.layout.dtype, [&](auto s) { layer_add_dx<decltype(s)>(a, begin, end); });
}

inline void upfirdn2d_any(const cpu::Upfirdn2dPlan& plan, int64_t begin, int64_t end, void* scratch) {
  for_dtype(plan.args.dtype, [&](auto s) { upfirdn2d_rows<decltype(s)>(plan, begin, end, scratch); });
}

inline void bias_act_fwd_any(const cpu::BiasActFwd& a, int64_t begin, int64_t end) {
  for_dtype(a.site.dtype, [&](auto s) { bias_act_fwd<decltype(s)>(a, begin, end); });
}
inline void bias_act_bwd_any(const cpu::BiasActBwdArgs& a, int64_t begin, int64_t end, double* sums, void* scratch) {
  for_dtype(a.site.dtype, [&](auto s) { bias_act_bwd<decltype(s)>(a, begin, end, sums, scratch); });
}
inline void bias_act_bwd_bwd_any(const cpu::BiasActBwdBwdArgs& a, int64_t begin, int64_t end, double* sums,
                                 void* scratch) {
  for_dtype(a.site.dtype, [&](auto s) { bias_act_bwd_bwd<decltype(s)>(a, begin, end, sums, scratch); });
}

constexpr cpu::KernelTable make_table(const char* isa) {
  return {isa,      FB_VEC_BYTES,       gates_fwd_any,      gates_bwd_any,         gates_bwd_bwd_any,
          pack_any, recurrence_fwd_any, recurrence_bwd_any, recurrence_bwd_bwd_any,
          layer_pack_any, layer_fwd_any, layer_bwd_any, layer_finish_any, layer_add_dx_any, upfirdn2d_any,
          bias_act_fwd_any, bias_act_bwd_any, bias_act_bwd_bwd_any};
}

}  // namespace fuseblock::FB_ISA
