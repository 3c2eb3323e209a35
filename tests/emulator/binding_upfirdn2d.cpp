// The CUDA launcher of upfirdn2d as a Python function on addresses.
#include <pybind11/pybind11.h>

#include "cuda/upfirdn2d.h"
#include "cuda_emulator.h"

namespace py = pybind11;

namespace {

void upfirdn2d(uintptr_t x, uintptr_t f, uintptr_t y, int64_t planes, int64_t channels, int in_h, int in_w, int out_h,
               int out_w, int taps_x, int taps_y, int up_x, int up_y, int down_x, int down_y, int pad_x, int pad_y,
               bool flip_filter, double gain, int dtype) {
  const fuseblock::Upfirdn2d op{reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(f),
                                reinterpret_cast<void*>(y), planes, channels, in_h, in_w, out_h, out_w, taps_x, taps_y,
                                up_x, up_y, down_x, down_y, pad_x, pad_y, flip_filter, gain};
  int error;
  {
    py::gil_scoped_release release;
    error = launch_upfirdn2d(&op, dtype, nullptr);
  }
  if (error != 0) throw py::value_error("the launcher returned cudaError " + std::to_string(error));
}

// Blocks and threads of the last launch.
py::tuple last_launch() {
  const auto [grid, block] = cuda_emulator::last_launch();
  return py::make_tuple(grid.x, block.x);
}

}  // namespace

PYBIND11_MODULE(emulated_upfirdn2d, m) {
  m.def("last_launch", &last_launch);
  m.def("upfirdn2d", &upfirdn2d);
  m.def("set_seed", &cuda_emulator::set_seed);
}
