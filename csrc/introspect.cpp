// fuseblock._introspect: how the library was built and what its CUDA kernels take of a multiprocessor.
//
// Built in the tree only: pybind11 is tied to one Python version, which the library itself is not.
#include <pybind11/pybind11.h>

#if defined(WITH_CUDA)
#include <cuda_runtime_api.h>

#include "cuda/kernel_registry.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  const py::object here = py::module_::import("fuseblock._introspect").attr("__file__");
  const py::object path = py::module_::import("pathlib").attr("Path")(here).attr("with_name")("_build.json");
  return py::module_::import("json").attr("loads")(path.attr("read_text")());
}

bool has_gpu() {
#if defined(WITH_CUDA)
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
#else
  return false;
#endif
}

py::list kernels_on_device([[maybe_unused]] int threads) {
  py::list rows;
#if defined(WITH_CUDA)
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  };
  for (const fuseblock::KernelEntry& kernel : fuseblock::kernel_registry()) {
    cudaFuncAttributes attributes;
    int blocks = 0;
    check(cudaFuncGetAttributes(&attributes, kernel.function));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, threads, 0));
    py::dict row;
    row["kernel"] = kernel.name;
    row["architecture"] = std::to_string(attributes.binaryVersion);
    row["registers"] = attributes.numRegs;
    row["shared"] = attributes.sharedSizeBytes;
    row["stack"] = attributes.localSizeBytes;
    row["blocks_per_multiprocessor"] = blocks;
    rows.append(row);
  }
#endif
  return rows;
}

py::list kernels(int threads) {
  if (has_gpu()) return kernels_on_device(threads);
  const py::object recorded = build_info()["kernels"];
  return recorded.is_none() ? py::list() : py::list(recorded);
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "How the native library was built, and the resources of its CUDA kernels.";
  m.def("build_info", &build_info,
        "The build's report as a dict: compilers, flags, architectures, kernels; or why something is missing.");
  m.def("has_gpu", &has_gpu, "Whether a CUDA device is there.");
  m.def("kernels", &kernels, py::arg("threads") = 128,
        "One dict per CUDA kernel: registers, shared and stack bytes per thread or block.\n\n"
        "On a machine with a GPU these are the loaded kernels' own, with the blocks of `threads` threads that fit on a\n"
        "multiprocessor at once; elsewhere those that the assembler reported at build time, for every architecture.");
}
