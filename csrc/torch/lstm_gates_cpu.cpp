// torch.ops.fuseblock_cpu.lstm_gates and its derivatives: checks, outputs, launch. Semantics: csrc/math/lstm_gates.h.
#include <tuple>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

// gates (..., 4H), c (..., H) in gates' dtype or its state dtype.
struct GatesInputs {
  const char* op;
  Shape wide, slim;
  ScalarType dtype, c_dtype;
  cpu::GatesShape shape;
  std::optional<Input> gates, c;

  GatesInputs(const char* op, const Tensor& g, const Tensor& cell) : op(op), wide(shape_of(g)), slim(wide) {
    check_isa(op);
    STD_TORCH_CHECK(!wide.empty() && wide.back() % 4 == 0, op, ": gates must have shape (..., 4H), got ", text(wide));
    slim.back() /= 4;
    dtype = g.scalar_type();
    shape.dtype = kernel_dtype(g, op, "gates");
    c_dtype = cell.scalar_type() == dtype ? dtype : state_type(dtype);
    shape.c_storage = c_dtype == dtype;
    shape.H = slim.back();
    shape.rows = 1;
    for (size_t i = 0; i + 1 < wide.size(); ++i) shape.rows *= wide[i];
    if (shape.H == 0) shape.rows = 0;
    gates.emplace(g, op, "gates", wide, dtype);
    c.emplace(cell, op, "c", slim, c_dtype);
  }
};

std::tuple<Tensor, Tensor> lstm_gates(const Tensor& gates, const Tensor& c) {
  const GatesInputs in("lstm_gates", gates, c);
  Tensor h = empty(in.slim, in.dtype), c_new = empty(in.slim, in.c_dtype);
  cpu::lstm_gates({in.shape, in.gates->data(), in.c->data(), h.mutable_data_ptr(), c_new.mutable_data_ptr()},
                  torch_threads());
  return {h, c_new};
}

std::tuple<Tensor, Tensor> lstm_gates_bwd(const MaybeTensor& dh, const MaybeTensor& dc_new, const Tensor& gates,
                                          const Tensor& c) {
  const GatesInputs in("lstm_gates_bwd", gates, c);
  const Input h(dh, in.op, "dh", in.slim, in.dtype), d(dc_new, in.op, "dc_new", in.slim, in.c_dtype);
  Tensor dgates = empty(in.wide, in.dtype), dc = empty(in.slim, in.c_dtype);
  cpu::lstm_gates_bwd({in.shape, h.data(), d.data(), in.gates->data(), in.c->data(), dgates.mutable_data_ptr(),
                       dc.mutable_data_ptr()},
                      torch_threads());
  return {dgates, dc};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_gates_bwd_bwd(const MaybeTensor& v_dgates, const MaybeTensor& v_dc,
                                                              const MaybeTensor& dh, const MaybeTensor& dc_new,
                                                              const Tensor& gates, const Tensor& c) {
  const GatesInputs in("lstm_gates_bwd_bwd", gates, c);
  const Input vg(v_dgates, in.op, "v_dgates", in.wide, in.dtype), vc(v_dc, in.op, "v_dc", in.slim, in.c_dtype);
  const Input h(dh, in.op, "dh", in.slim, in.dtype), d(dc_new, in.op, "dc_new", in.slim, in.c_dtype);
  Tensor a_dh = empty(in.slim, in.dtype), a_dc_new = empty(in.slim, in.c_dtype);
  Tensor a_gates = empty(in.wide, in.dtype), a_c = empty(in.slim, in.c_dtype);
  cpu::lstm_gates_bwd_bwd({in.shape, vg.data(), vc.data(), h.data(), d.data(), in.gates->data(), in.c->data(),
                           a_dh.mutable_data_ptr(), a_dc_new.mutable_data_ptr(), a_gates.mutable_data_ptr(),
                           a_c.mutable_data_ptr()},
                          torch_threads());
  return {a_dh, a_dc_new, a_gates, a_c};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("lstm_gates", TORCH_BOX(&lstm_gates));
  m.impl("lstm_gates_bwd", TORCH_BOX(&lstm_gates_bwd));
  m.impl("lstm_gates_bwd_bwd", TORCH_BOX(&lstm_gates_bwd_bwd));
}

}  // namespace fuseblock::torch_cpu
