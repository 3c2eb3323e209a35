// The CUDA launchers of the LSTM step as Python functions on CPU tensors. Knows torch tensors by their Python interface only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/dtype.h"
#include "cuda/lstm_gates.h"
#include "cuda_emulator.h"

namespace py = pybind11;
using fuseblock::Rows;

namespace {

std::string dtype_name(py::handle tensor) { return py::str(tensor.attr("dtype")); }

int dtype_number(py::handle tensor) {
  const std::string name = dtype_name(tensor);
  if (name == "torch.float64") return fuseblock::kFloat64;
  if (name == "torch.float32") return fuseblock::kFloat32;
  if (name == "torch.float16") return fuseblock::kFloat16;
  if (name == "torch.bfloat16") return fuseblock::kBFloat16;
  throw py::type_error("dtype " + name + " is not supported");
}

// The operands of one call: rows x H, gates of dtype T, states of dtype C.
class Operands {
 public:
  Operands(py::handle gates, py::handle c, py::handle lengths, int64_t t)
      : dtype(dtype_number(gates)), c_dtype(dtype_number(c)) {
    shape.rows = c.attr("shape").attr("__getitem__")(0).cast<int64_t>();
    shape.hidden = c.attr("shape").attr("__getitem__")(1).cast<int64_t>();
    shape.t = t;
    if (!lengths.is_none()) {
      if (dtype_name(lengths) != "torch.int64") throw py::type_error("lengths must be int64");
      shape.lengths = reinterpret_cast<const int64_t*>(lengths.attr("data_ptr")().cast<uintptr_t>());
    }
  }

  Rows gates(py::handle x) const { return view(x, dtype, 4 * shape.hidden); }
  Rows cells(py::handle x) const { return view(x, dtype, shape.hidden); }
  Rows states(py::handle x) const { return view(x, c_dtype, shape.hidden); }

  int dtype, c_dtype;
  fuseblock::LstmStepShape shape{};

 private:
  Rows view(py::handle x, int expected_dtype, int64_t columns) const {
    if (x.is_none()) return {nullptr, 0};
    const auto size = x.attr("shape").cast<std::pair<int64_t, int64_t>>();
    const auto stride = x.attr("stride")().cast<std::pair<int64_t, int64_t>>();
    if (size != std::make_pair(shape.rows, columns) || (columns > 1 && stride.second != 1)) {
      throw py::value_error("expected " + std::to_string(shape.rows) + " contiguous rows of " + std::to_string(columns));
    }
    if (dtype_number(x) != expected_dtype) throw py::type_error("unexpected dtype " + dtype_name(x));
    return {reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>()), stride.first};
  }
};

template <class Step>
void launch(int (*launcher)(const Step*, int, int, void*), const Step& step, const Operands& is) {
  int error;
  {
    py::gil_scoped_release release;
    error = launcher(&step, is.dtype, is.c_dtype, nullptr);
  }
  if (error != 0) throw py::value_error("the launcher returned cudaError " + std::to_string(error));
}

using H = py::handle;

void step_fwd(H pre, H c_prev, H h_out, H c_out, H acts_out, H lengths, int64_t t, H h_state) {
  const Operands is(pre, c_prev, lengths, t);
  launch(launch_lstm_step_fwd,
         {is.shape, is.gates(pre), is.states(c_prev), is.cells(h_out), is.states(c_out), is.gates(acts_out),
          is.cells(h_state)},
         is);
}

fuseblock::LstmStepBwd bwd_operands(const Operands& is, H gates, H c_prev, H c, H dm, H dc, H ext, H delta, H dc_prev,
                                    H dm_keep, H dc_total, H dy, H d_c) {
  return {is.shape,        is.gates(gates),  is.states(c_prev), is.states(c),      is.cells(dm),      is.cells(dy),
          is.states(dc),   is.states(d_c),   is.gates(ext),     is.gates(delta),   is.states(dc_prev), is.cells(dm_keep),
          is.states(dc_total)};
}

void step_bwd(H acts, H c_prev, H c_new, H dm, H dc, H ext, H lengths, int64_t t, H delta_out, H dc_prev_out, H dm_keep,
              H dc_total_out, H dy, H d_c) {
  const Operands is(acts, c_prev, lengths, t);
  launch(launch_lstm_step_bwd,
         bwd_operands(is, acts, c_prev, c_new, dm, dc, ext, delta_out, dc_prev_out, dm_keep, dc_total_out, dy, d_c), is);
}

void gates_bwd(H dh, H dc_new, H gates, H c, H dgates_out, H dc_out) {
  const Operands is(gates, c, py::none(), 0);
  const py::none none;
  launch(launch_lstm_gates_bwd,
         bwd_operands(is, gates, c, none, dh, dc_new, none, dgates_out, dc_out, none, none, none, none), is);
}

void step_bwd_bwd(H acts, H c_prev, H c_new, H dm, H dc_total, H ext, H v, H v_dc_prev, H lengths, int64_t t, H a_dm_out,
                  H a_dc_out, H a_ext_out, H a_acts_out, H a_c_prev_out, H a_c_new_out, H a_dm_state) {
  const Operands is(acts, c_prev, lengths, t);
  launch(launch_lstm_step_bwd_bwd,
         {is.shape, is.gates(acts), is.states(c_prev), is.states(c_new), is.cells(dm), is.states(dc_total),
          is.gates(ext), is.gates(v), is.states(v_dc_prev), is.cells(a_dm_out), is.states(a_dc_out),
          is.gates(a_ext_out), is.gates(a_acts_out), is.states(a_c_prev_out), is.states(a_c_new_out),
          is.cells(a_dm_state)},
         is);
}

void gates_bwd_bwd(H v_dgates, H v_dc, H dh, H dc_new, H gates, H c, H a_dh_out, H a_dc_new_out, H a_gates_out,
                   H a_c_out) {
  const Operands is(gates, c, py::none(), 0);
  const Rows absent{nullptr, 0};
  launch(launch_lstm_gates_bwd_bwd,
         {is.shape, is.gates(gates), is.states(c), absent, is.cells(dh), is.states(dc_new), absent, is.gates(v_dgates),
          is.states(v_dc), is.cells(a_dh_out), is.states(a_dc_new_out), absent, is.gates(a_gates_out),
          is.states(a_c_out), absent, absent},
         is);
}

// What a launcher returns where nothing is launched: for the sizes and dtypes of no operands.
int launch_nothing(int64_t rows, int64_t hidden, int dtype, int c_dtype) {
  fuseblock::LstmStepFwd step{};
  step.shape.rows = rows;
  step.shape.hidden = hidden;
  return launch_lstm_step_fwd(&step, dtype, c_dtype, nullptr);
}

// Blocks over rows, blocks over units, threads over units, threads over rows of the last launch.
std::vector<unsigned> last_launch() {
  const auto [grid, block] = cuda_emulator::last_launch();
  return {grid.x, grid.y, block.x, block.y};
}

}  // namespace

PYBIND11_MODULE(emulated_lstm_gates, m) {
  m.def("step_fwd", &step_fwd);
  m.def("step_bwd", &step_bwd);
  m.def("step_bwd_bwd", &step_bwd_bwd);
  m.def("gates_bwd", &gates_bwd);
  m.def("gates_bwd_bwd", &gates_bwd_bwd);
  m.def("launch_nothing", &launch_nothing);
  m.def("last_launch", &last_launch);
  m.def("set_seed", &cuda_emulator::set_seed);
  m.def("set_workers", &cuda_emulator::set_workers);
}
