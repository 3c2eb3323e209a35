// CUDA operators of the LSTM step: lstm_gates with its two backward operators, and the in-place steps of the recurrence.
#if defined(WITH_CUDA)

#include "cuda/lstm_gates.h"

#include <tuple>

#include "torch/cuda_tensors.h"

namespace fuseblock::torch_cuda {
namespace {

// One call: what its T-typed and C-typed operands must look like, and the launch on the device of its gates.
class StepCall {
 public:
  Expected gates, cells, states;  // T (rows, 4H), T (rows, H), C (rows, H)

  StepCall(const char* op, const Tensor& gates_tensor, const Tensor& c) : device_(gates_tensor) {
    const int64_t hidden = c.dim() > 0 ? c.size(c.dim() - 1) : 0;
    const int64_t rows = hidden > 0 ? c.numel() / hidden : 0;
    const int32_t device = gates_tensor.get_device_index();
    gates = {op, gates_tensor.scalar_type(), device, rows, 4 * hidden};
    cells = {op, gates_tensor.scalar_type(), device, rows, hidden};
    states = {op, c.scalar_type(), device, rows, hidden};
    const bool fits = c.scalar_type() == gates_tensor.scalar_type() || c.scalar_type() == state_dtype(gates_tensor);
    STD_TORCH_CHECK(fits, "fuseblock::", op, ": c must have the dtype of gates or the state dtype");
    dtype_ = dtype_number(gates_tensor, op);
    c_dtype_ = dtype_number(c, op);
  }

  LstmStepShape shape() const { return {states.rows, states.columns, nullptr, 0}; }

  LstmStepShape shape(const MaybeTensor& lengths, int64_t t) const {
    LstmStepShape shape = this->shape();
    shape.t = t;
    if (lengths.has_value()) {
      const bool fits = lengths->dim() == 1 && lengths->size(0) == states.rows && lengths->is_contiguous() &&
                        lengths->scalar_type() == ScalarType::Long && lengths->is_cuda() &&
                        lengths->get_device_index() == states.device;
      STD_TORCH_CHECK(fits, "fuseblock::", states.op, ": expected lengths int64, contiguous, of shape (", states.rows,
                      ",) on CUDA device ", states.device);
      shape.lengths = static_cast<const int64_t*>(lengths->data_ptr());
    }
    return shape;
  }

  template <class Step>
  void launch(int (*launcher)(const Step*, int, int, void*), const Step& step) const {
    check_launch(launcher(&step, dtype_, c_dtype_, device_.stream()), states.op);
  }

 private:
  OnDeviceOf device_;
  DType dtype_, c_dtype_;
};

Tensor fresh_like(const Tensor& shape_of, const Tensor& dtype_of) {
  return torch::stable::new_empty(dtype_of, shape_of.sizes());
}

Rows fresh_rows(const Tensor& x) { return {x.data_ptr(), x.size(x.dim() - 1)}; }

std::tuple<Tensor, Tensor> lstm_gates(const Tensor& gates, const Tensor& c) {
  const StepCall call("lstm_gates", gates, c);
  const InputRows pre(gates, "gates", call.gates), c_prev(c, "c", call.states);
  Tensor h = fresh_like(c, gates), c_new = fresh_like(c, c);
  const LstmStepFwd step{
      .shape = call.shape(), .pre = pre, .c_prev = c_prev, .h = fresh_rows(h), .c = fresh_rows(c_new)};
  call.launch(launch_lstm_step_fwd, step);
  return {h, c_new};
}

std::tuple<Tensor, Tensor> lstm_gates_bwd(const MaybeTensor& dh, const MaybeTensor& dc_new, const Tensor& gates,
                                          const Tensor& c) {
  const StepCall call("lstm_gates_bwd", gates, c);
  const InputRows pre(gates, "gates", call.gates), c_prev(c, "c", call.states);
  const InputRows dm(dh, "dh", call.cells), dc(dc_new, "dc_new", call.states);
  Tensor dgates = fresh_like(gates, gates), dc_prev = fresh_like(c, c);
  const LstmStepBwd step{.shape = call.shape(), .gates = pre, .c_prev = c_prev, .dm = dm, .dc = dc,
                         .delta = fresh_rows(dgates), .dc_prev = fresh_rows(dc_prev)};
  call.launch(launch_lstm_gates_bwd, step);
  return {dgates, dc_prev};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_gates_bwd_bwd(const MaybeTensor& v_dgates, const MaybeTensor& v_dc,
                                                              const MaybeTensor& dh, const MaybeTensor& dc_new,
                                                              const Tensor& gates, const Tensor& c) {
  const StepCall call("lstm_gates_bwd_bwd", gates, c);
  const InputRows pre(gates, "gates", call.gates), c_prev(c, "c", call.states);
  const InputRows dm(dh, "dh", call.cells), dc(dc_new, "dc_new", call.states);
  const InputRows v(v_dgates, "v_dgates", call.gates), v_dc_prev(v_dc, "v_dc", call.states);
  Tensor a_dh = fresh_like(c, gates), a_dc_new = fresh_like(c, c);
  Tensor a_gates = fresh_like(gates, gates), a_c = fresh_like(c, c);
  const LstmStepBwdBwd step{.shape = call.shape(), .gates = pre, .c_prev = c_prev, .dm = dm, .dc = dc, .v = v,
                            .v_dc_prev = v_dc_prev, .a_dm = fresh_rows(a_dh), .a_dc = fresh_rows(a_dc_new),
                            .a_gates = fresh_rows(a_gates), .a_c_prev = fresh_rows(a_c)};
  call.launch(launch_lstm_gates_bwd_bwd, step);
  return {a_dh, a_dc_new, a_gates, a_c};
}

void lstm_step_fwd(const Tensor& pre, const Tensor& c_prev, const Tensor& h_out, const Tensor& c_out,
                   const MaybeTensor& acts_out, const MaybeTensor& lengths, int64_t t, const MaybeTensor& h_state) {
  const StepCall call("lstm_step_fwd", pre, c_prev);
  const LstmStepFwd step{call.shape(lengths, t),
                         matrix_rows(pre, "pre", call.gates),
                         matrix_rows(c_prev, "c_prev", call.states),
                         matrix_rows(h_out, "h_out", call.cells),
                         matrix_rows(c_out, "c_out", call.states),
                         matrix_rows(acts_out, "acts_out", call.gates),
                         matrix_rows(h_state, "h_state", call.cells)};
  call.launch(launch_lstm_step_fwd, step);
}

void lstm_step_bwd(const Tensor& acts, const Tensor& c_prev, const Tensor& c_new, const MaybeTensor& dm,
                   const MaybeTensor& dc, const MaybeTensor& ext, const MaybeTensor& lengths, int64_t t,
                   const MaybeTensor& delta_out, const Tensor& dc_prev_out, const MaybeTensor& dm_keep,
                   const MaybeTensor& dc_total_out, const MaybeTensor& dy, const MaybeTensor& d_c) {
  const StepCall call("lstm_step_bwd", acts, c_prev);
  const LstmStepBwd step{call.shape(lengths, t),
                         matrix_rows(acts, "acts", call.gates),
                         matrix_rows(c_prev, "c_prev", call.states),
                         matrix_rows(c_new, "c_new", call.states),
                         matrix_rows(dm, "dm", call.cells),
                         matrix_rows(dy, "dy", call.cells),
                         matrix_rows(dc, "dc", call.states),
                         matrix_rows(d_c, "d_c", call.states),
                         matrix_rows(ext, "ext", call.gates),
                         matrix_rows(delta_out, "delta_out", call.gates),
                         matrix_rows(dc_prev_out, "dc_prev_out", call.states),
                         matrix_rows(dm_keep, "dm_keep", call.cells),
                         matrix_rows(dc_total_out, "dc_total_out", call.states)};
  call.launch(launch_lstm_step_bwd, step);
}

void lstm_step_bwd_bwd(const Tensor& acts, const Tensor& c_prev, const Tensor& c_new, const MaybeTensor& dm,
                       const Tensor& dc_total, const MaybeTensor& ext, const MaybeTensor& v,
                       const MaybeTensor& v_dc_prev, const MaybeTensor& lengths, int64_t t, const Tensor& a_dm_out,
                       const Tensor& a_dc_out, const MaybeTensor& a_ext_out, const Tensor& a_acts_out,
                       const Tensor& a_c_prev_out, const Tensor& a_c_new_out, const MaybeTensor& a_dm_state) {
  const StepCall call("lstm_step_bwd_bwd", acts, c_prev);
  const LstmStepBwdBwd step{call.shape(lengths, t),
                            matrix_rows(acts, "acts", call.gates),
                            matrix_rows(c_prev, "c_prev", call.states),
                            matrix_rows(c_new, "c_new", call.states),
                            matrix_rows(dm, "dm", call.cells),
                            matrix_rows(dc_total, "dc_total", call.states),
                            matrix_rows(ext, "ext", call.gates),
                            matrix_rows(v, "v", call.gates),
                            matrix_rows(v_dc_prev, "v_dc_prev", call.states),
                            matrix_rows(a_dm_out, "a_dm_out", call.cells),
                            matrix_rows(a_dc_out, "a_dc_out", call.states),
                            matrix_rows(a_ext_out, "a_ext_out", call.gates),
                            matrix_rows(a_acts_out, "a_acts_out", call.gates),
                            matrix_rows(a_c_prev_out, "a_c_prev_out", call.states),
                            matrix_rows(a_c_new_out, "a_c_new_out", call.states),
                            matrix_rows(a_dm_state, "a_dm_state", call.cells)};
  call.launch(launch_lstm_step_bwd_bwd, step);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fuseblock_cuda, m) {
  m.def("lstm_gates(Tensor gates, Tensor c) -> (Tensor, Tensor)");
  m.def("lstm_gates_bwd(Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c) -> (Tensor, Tensor)");
  m.def(
      "lstm_gates_bwd_bwd(Tensor? v_dgates, Tensor? v_dc, Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_step_fwd(Tensor pre, Tensor c_prev, Tensor(a!) h_out, Tensor(b!) c_out, Tensor(c!)? acts_out,"
      " Tensor? lengths, int t, Tensor(d!)? h_state) -> ()");
  m.def(
      "lstm_step_bwd(Tensor acts, Tensor c_prev, Tensor c_new, Tensor? dm, Tensor? dc, Tensor? ext, Tensor? lengths,"
      " int t, Tensor(a!)? delta_out, Tensor(b!) dc_prev_out, Tensor(c!)? dm_keep, Tensor(d!)? dc_total_out,"
      " Tensor? dy, Tensor? d_c) -> ()");
  m.def(
      "lstm_step_bwd_bwd(Tensor acts, Tensor c_prev, Tensor c_new, Tensor? dm, Tensor dc_total, Tensor? ext, Tensor? v,"
      " Tensor? v_dc_prev, Tensor? lengths, int t, Tensor(a!) a_dm_out, Tensor(b!) a_dc_out, Tensor(c!)? a_ext_out,"
      " Tensor(d!) a_acts_out, Tensor(e!) a_c_prev_out, Tensor(f!) a_c_new_out, Tensor(g!)? a_dm_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cuda, CUDA, m) {
  m.impl("lstm_gates", TORCH_BOX(&lstm_gates));
  m.impl("lstm_gates_bwd", TORCH_BOX(&lstm_gates_bwd));
  m.impl("lstm_gates_bwd_bwd", TORCH_BOX(&lstm_gates_bwd_bwd));
  m.impl("lstm_step_fwd", TORCH_BOX(&lstm_step_fwd));
  m.impl("lstm_step_bwd", TORCH_BOX(&lstm_step_bwd));
  m.impl("lstm_step_bwd_bwd", TORCH_BOX(&lstm_step_bwd_bwd));
}

}  // namespace
}  // namespace fuseblock::torch_cuda

#endif
