// Calls the microbenchmarks' functions, which Python finds by name, so that the emulator's complaints become exceptions.
#include <pybind11/pybind11.h>

#include "cuda_emulator.h"
#include "device.h"
#include "../../benchmarks/micro/micro.h"

namespace py = pybind11;

PYBIND11_MODULE(emulated_micro, m) {
  m.def("call", [](uintptr_t function, uintptr_t launch) {
    py::gil_scoped_release release;
    return reinterpret_cast<MicroFunction*>(function)(reinterpret_cast<const MicroLaunch*>(launch));
  });
  m.def("set_seed", &cuda_emulator::set_seed);
  m.def("set_clusters", [](bool clusters) {
    cuda_emulator::Device device;
    device.clusters = clusters;
    cuda_emulator::set_device(device);
  });
}
