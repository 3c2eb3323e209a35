// The CUDA launchers of bias_act as one Python function on CPU tensors. Knows torch tensors by their Python interface.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "cuda/bias_act.h"
#include "cuda_emulator.h"

namespace py = pybind11;
using fuseblock::BiasAct;

namespace {

using Launcher = int (*)(const BiasAct*, int, void*);

const std::map<std::string, Launcher> kLaunchers = {
    {"fwd", launch_bias_act_fwd}, {"bwd", launch_bias_act_bwd}, {"bwd_bwd", launch_bias_act_bwd_bwd}};

void set_pointer(BiasAct& op, const std::string& name, void* data) {
#define FB_FIELD(field) \
  if (name == #field) return void(op.field = static_cast<decltype(op.field)>(data));
  FB_FIELD(bias)
  FB_FIELD(slope)
  FB_FIELD(x)
  FB_FIELD(dy)
  FB_FIELD(v)
  FB_FIELD(v_bias)
  FB_FIELD(v_slope)
  FB_FIELD(mask)
  FB_FIELD(out)
  FB_FIELD(a_x)
  FB_FIELD(new_mask)
  FB_FIELD(sums)
  FB_FIELD(slope_sums)
  FB_FIELD(partials)
#undef FB_FIELD
  throw py::key_error(name);
}

BiasAct operands(const py::dict& numbers, const py::dict& tensors) {
  BiasAct op{};
  op.samples = numbers["samples"].cast<int64_t>();
  op.channels = numbers["channels"].cast<int64_t>();
  op.size = numbers["size"].cast<int64_t>();
  op.channels_last = numbers["channels_last"].cast<bool>();
  op.activation = numbers["activation"].cast<int>();
  op.negative_slope = numbers["negative_slope"].cast<double>();
  op.gain = numbers["gain"].cast<double>();
  op.clamp = numbers["clamp"].cast<double>();
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.is_none() && tensor.attr("numel")().cast<int64_t>() > 0) {
      set_pointer(op, name.cast<std::string>(), reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()));
    }
  }
  return op;
}

void launch(const std::string& kernel, const py::dict& numbers, const py::dict& tensors, int dtype) {
  const BiasAct op = operands(numbers, tensors);
  int error;
  {
    py::gil_scoped_release release;
    error = kLaunchers.at(kernel)(&op, dtype, nullptr);
  }
  if (error != 0) throw py::value_error("the launcher returned cudaError " + std::to_string(error));
}

int64_t splits(const py::dict& numbers) {
  const BiasAct op = operands(numbers, py::dict());
  return bias_act_splits(&op);
}

// Blocks x, y and threads x, y of the last launch.
py::tuple last_launch() {
  const auto [grid, block] = cuda_emulator::last_launch();
  return py::make_tuple(grid.x, grid.y, block.x, block.y);
}

}  // namespace

PYBIND11_MODULE(emulated_bias_act, m) {
  m.def("launch", &launch);
  m.def("splits", &splits);
  m.def("last_launch", &last_launch);
  m.def("set_seed", &cuda_emulator::set_seed);
  m.def("set_workers", &cuda_emulator::set_workers);
}
