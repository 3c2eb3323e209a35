// The CUDA launchers of one tier of the recurrence as Python functions on CPU tensors. FB_TIER: which, e.g. block.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#define FB_STRING(x) #x
#define FB_HEADER(tier) FB_STRING(cuda/lstm_recurrence_##tier.h)
#define FB_TIER_HEADER(tier) FB_HEADER(tier)
#include FB_TIER_HEADER(FB_TIER)
#include "cuda_emulator.h"
#include "device.h"

namespace py = pybind11;
using namespace fuseblock;

// Of tiers whose blocks depend on each other: how many run at the same time. Others do not have the functions.
#define FB_RESIDENT_OF(tier, pass) lstm_##tier##_##pass##_resident
#define FB_RESIDENT(tier, pass) FB_RESIDENT_OF(tier, pass)
extern "C" __attribute__((weak)) int FB_RESIDENT(FB_TIER, fwd)(int64_t hidden, int dtype);
extern "C" __attribute__((weak)) int FB_RESIDENT(FB_TIER, bwd)(int64_t hidden, int dtype);

#define FB_LAUNCHER_OF(tier, pass) launch_lstm_##tier##_##pass
#define FB_LAUNCHER(tier, pass) FB_LAUNCHER_OF(tier, pass)

// Of the tier that computes a small layer's input projection itself.
extern "C" __attribute__((weak)) int FB_LAUNCHER(FB_TIER, layer_fwd)(const LstmLayerFwd* op, int dtype, void* stream);

namespace {

using H = py::handle;
using Gpu = std::pair<int, int64_t>;  // multiprocessors; bytes of shared memory that a block may have

#define FB_MODULE_OF(tier) emulated_lstm_recurrence_##tier
#define FB_MODULE(tier) FB_MODULE_OF(tier)

template <class T>
T* address(H x) {
  return x.is_none() ? nullptr : reinterpret_cast<T*>(x.attr("data_ptr")().cast<uintptr_t>());
}

int64_t bytes(H x) { return x.is_none() ? 0 : x.attr("nbytes").cast<int64_t>(); }

// (steps, batch, columns) with contiguous columns.
Sequence sequence(H x) {
  if (x.is_none()) return {};
  const auto stride = [&](int d) { return x.attr("stride")(d).cast<int64_t>(); };
  return {address<void>(x), stride(0), stride(1)};
}

LstmShape shape(H gates, H c0, H lengths, Gpu gpu, int passes) {
  const auto size = [](H x, int d) { return x.attr("shape").attr("__getitem__")(d).cast<int64_t>(); };
  return {size(gates, 0), size(c0, 1), size(c0, 2), size(c0, 0), address<int64_t>(lengths), gpu.first, gpu.second,
          passes};
}

template <class Op>
void launch(int (*launcher)(const Op*, int, void*), const Op& op, int dtype) {
  int error;
  {
    py::gil_scoped_release release;
    error = launcher(&op, dtype, nullptr);
  }
  if (error != 0) throw py::value_error("the launcher returned cudaError " + std::to_string(error));
}

void fwd(H gx, H h0, H c0, H w_hh, H lengths, H y, H h_n, H c_n, H gates, H c, H workspace, int passes,
         Gpu gpu, int dtype) {
  launch(FB_LAUNCHER(FB_TIER, fwd),
         {shape(gx, c0, lengths, gpu, passes), sequence(gx), address<void>(h0), address<void>(w_hh), address<float>(c0),
          address<void>(y), address<void>(h_n), address<float>(c_n), address<void>(gates), address<float>(c),
          address<void>(workspace), bytes(workspace)},
         dtype);
}

void bwd(H dy, H dh_n, H dc_n, H d_gates, H d_c, H gates, H c, H c0, H w_hh, H lengths, H dgx, H dh0, H dc0,
         H workspace, int passes, Gpu gpu, int dtype) {
  launch(FB_LAUNCHER(FB_TIER, bwd),
         {shape(gates, c0, lengths, gpu, passes), sequence(dy), address<void>(dh_n), address<float>(dc_n),
          address<void>(d_gates), address<float>(d_c), address<void>(gates), address<float>(c), address<float>(c0),
          address<void>(w_hh), address<void>(dgx), address<void>(dh0), address<float>(dc0),
          address<void>(workspace), bytes(workspace)},
         dtype);
}

// w_ih and b: a tensor, or two, of each direction.
void layer_fwd(H x, const std::vector<H>& w_ih, const std::vector<H>& b, H h0, H c0, H w_hh, H lengths, H y, H h_n, H c_n,
               H gates, H c, Gpu gpu, int dtype) {
  LstmLayerFwd op{{shape(x, c0, lengths, gpu, 1), {}, address<void>(h0), address<void>(w_hh), address<float>(c0),
                   address<void>(y), address<void>(h_n), address<float>(c_n), address<void>(gates), address<float>(c)},
                  sequence(x), x.attr("shape").attr("__getitem__")(2).cast<int64_t>()};
  for (size_t d = 0; d < w_ih.size(); ++d) {
    op.w_ih[d] = address<void>(w_ih[d]);
    if (!b.empty()) op.b_ih[d] = address<void>(b[2 * d]), op.b_hh[d] = address<void>(b[2 * d + 1]);
  }
  launch(FB_LAUNCHER(FB_TIER, layer_fwd), op, dtype);
}

void set_device(bool clusters, bool cooperative, int multiprocessors, unsigned largest_cluster, size_t shared_bytes) {
  cuda_emulator::Device device;
  device.clusters = clusters;
  device.cooperative = cooperative;
  device.multiprocessors = multiprocessors;
  device.largest_cluster = largest_cluster;
  device.shared_bytes = shared_bytes;
  cuda_emulator::set_device(device);
}

// Blocks over rows and directions, threads.
py::tuple last_launch() {
  const auto [grid, block] = cuda_emulator::last_launch();
  return py::make_tuple(grid.x, grid.y, block.x);
}

}  // namespace

PYBIND11_MODULE(FB_MODULE(FB_TIER), m) {
  m.def("fwd", &fwd);
  m.def("bwd", &bwd);
  if (FB_RESIDENT(FB_TIER, fwd) != nullptr) {
    m.def("fwd_resident", FB_RESIDENT(FB_TIER, fwd));
    m.def("bwd_resident", FB_RESIDENT(FB_TIER, bwd));
  }
  if (FB_LAUNCHER(FB_TIER, layer_fwd) != nullptr) m.def("layer_fwd", &layer_fwd);
  m.def("set_device", &set_device, py::arg("clusters") = true, py::arg("cooperative") = true,
        py::arg("multiprocessors") = 132, py::arg("largest_cluster") = 16, py::arg("shared_bytes") = 227 << 10);
  m.def("last_launch", &last_launch);
  m.def("set_seed", &cuda_emulator::set_seed);
  m.def("set_workers", &cuda_emulator::set_workers);
}
