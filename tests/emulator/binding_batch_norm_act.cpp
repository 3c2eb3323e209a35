// The CUDA launchers of batch_norm_act as one Python function on CPU tensors. Knows torch tensors by their Python interface.
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/batch_norm_act.h"
#include "cuda_emulator.h"
#include "device.h"

namespace py = pybind11;
using fuseblock::BatchNormAct;

namespace {

using Launcher = int (*)(const BatchNormAct*, int, void*);
using WholeLauncher = int (*)(const BatchNormAct*, int, const fuseblock::DeviceLimits*, void*);

const std::map<std::string, Launcher> kLaunchers = {
    {"stats", launch_batch_norm_act_stats},
    {"fwd", launch_batch_norm_act_fwd},
    {"bwd_reduce", launch_batch_norm_act_bwd_reduce},
    {"bwd", launch_batch_norm_act_bwd},
    {"bwd_bwd_reduce", launch_batch_norm_act_bwd_bwd_reduce},
    {"bwd_bwd", launch_batch_norm_act_bwd_bwd},
};

const std::map<std::string, WholeLauncher> kWholeLaunchers = {
    {"whole_fwd", launch_batch_norm_act_whole_fwd},
    {"whole_bwd", launch_batch_norm_act_whole_bwd},
};

void set_pointer(BatchNormAct& op, const std::string& name, void* data) {
#define FB_FIELD(field) \
  if (name == #field) return void(op.field = static_cast<decltype(op.field)>(data));
  FB_FIELD(x)
  FB_FIELD(residual)
  FB_FIELD(mean)
  FB_FIELD(invstd)
  FB_FIELD(weight)
  FB_FIELD(bias)
  FB_FIELD(slope)
  FB_FIELD(mask)
  FB_FIELD(dy)
  FB_FIELD(v)
  FB_FIELD(v_residual)
  FB_FIELD(k)
  FB_FIELD(y)
  FB_FIELD(dx)
  FB_FIELD(dresidual)
  FB_FIELD(a_x)
  FB_FIELD(a_dy)
  FB_FIELD(a_residual)
  FB_FIELD(new_mask)
  FB_FIELD(sums)
  FB_FIELD(workspace)
  FB_FIELD(new_mean)
  FB_FIELD(new_var)
  FB_FIELD(new_invstd)
  FB_FIELD(new_k)
#undef FB_FIELD
  throw py::key_error(name);
}

BatchNormAct operands(const py::dict& numbers, const py::dict& tensors) {
  BatchNormAct op{};
  op.samples = numbers["samples"].cast<int64_t>();
  op.channels = numbers["channels"].cast<int64_t>();
  op.size = numbers["size"].cast<int64_t>();
  op.channels_last = numbers["channels_last"].cast<bool>();
  op.activation = numbers["activation"].cast<int>();
  op.slope_stride = numbers["slope_stride"].cast<int>();
  op.negative_slope = numbers["negative_slope"].cast<double>();
  op.eps = numbers["eps"].cast<double>();
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.is_none()) {
      set_pointer(op, name.cast<std::string>(), reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()));
    }
  }
  return op;
}

// On the emulated device of set_device().
void launch(const std::string& kernel, const py::dict& numbers, const py::dict& tensors, int dtype) {
  const BatchNormAct op = operands(numbers, tensors);
  const auto& device = cuda_emulator::device();
  const fuseblock::DeviceLimits limits{device.clusters, device.cooperative, device.shared_bytes};
  int error;
  {
    py::gil_scoped_release release;
    const auto whole = kWholeLaunchers.find(kernel);
    error = whole != kWholeLaunchers.end() ? whole->second(&op, dtype, &limits, nullptr)
                                           : kLaunchers.at(kernel)(&op, dtype, nullptr);
  }
  if (error != 0) throw py::value_error("the launcher returned cudaError " + std::to_string(error));
}

int64_t splits(const py::dict& numbers) {
  const BatchNormAct op = operands(numbers, py::dict());
  return batch_norm_act_splits(&op);
}

// Blocks x, y and threads x, y of the last launch.
py::tuple last_launch() {
  const auto [grid, block] = cuda_emulator::last_launch();
  return py::make_tuple(grid.x, grid.y, block.x, block.y);
}

void set_device(bool clusters, size_t shared_bytes, unsigned largest_cluster) {
  cuda_emulator::Device device;
  device.clusters = clusters;
  device.shared_bytes = shared_bytes;
  device.largest_cluster = largest_cluster;
  cuda_emulator::set_device(device);
}

}  // namespace

PYBIND11_MODULE(emulated_batch_norm_act, m) {
  m.def("launch", &launch);
  m.def("splits", &splits);
  m.def("last_launch", &last_launch);
  m.def("set_device", &set_device, py::arg("clusters") = true, py::arg("shared_bytes") = 227 << 10,
        py::arg("largest_cluster") = 16);
  m.def("set_seed", &cuda_emulator::set_seed);
  m.def("set_workers", &cuda_emulator::set_workers);
}
