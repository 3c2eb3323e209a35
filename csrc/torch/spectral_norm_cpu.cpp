// torch.ops.fuseblock_cpu.spectral_norm and its derivative: checks, outputs, launch. Semantics: csrc/cpu/spectral_norm.h.
#include "../cpu/spectral_norm.h"

#include <cstring>
#include <tuple>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

// The state of a call is one tensor: u, v and sigma of every weight, one after the other.
struct SpectralCall {
  const char* op;
  ScalarType dtype;
  std::vector<Input> weights;
  std::vector<cpu::SpectralMatrix> matrices;
  int64_t state_elements = 0;

  SpectralCall(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims) : op(op) {
    check_isa(op);
    STD_TORCH_CHECK(!tensors.empty() && tensors.size() == dims.size(), op, ": expected as many dims as weights, got ",
                    dims.size(), " and ", tensors.size());
    dtype = tensors[0].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": weights must be float32 or float64, got ", name_of(dtype));
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Shape shape = shape_of(tensors[i]);
      STD_TORCH_CHECK(shape.size() >= 2 && dims[i] >= 0 && dims[i] < (int64_t)shape.size(), op,
                      ": expected a weight of two or more dimensions and one of them, got ", text(shape), ", dim ", dims[i]);
      weights.emplace_back(tensors[i], op, "weight", shape, dtype);
      cpu::SpectralMatrix m = {shape[dims[i]], 1, 1, weights.back().data(), nullptr, nullptr, nullptr, nullptr, nullptr};
      for (int64_t d = 0; d < (int64_t)shape.size(); ++d) {
        if (d < dims[i]) m.segments *= shape[d];
        if (d > dims[i]) m.length *= shape[d];
      }
      matrices.push_back(m);
      state_elements += m.rows + m.columns() + 1;
    }
  }

  int64_t element() const { return dtype == ScalarType::Double ? 8 : 4; }
  cpu::DType kernel() const { return dtype == ScalarType::Double ? cpu::DType::f64 : cpu::DType::f32; }

  void place(void* state) {
    char* p = static_cast<char*>(state);
    for (cpu::SpectralMatrix& m : matrices) {
      m.u = p, p += m.rows * element();
      m.v = p, p += m.columns() * element();
      m.sigma = p, p += element();
    }
  }
};

std::tuple<std::vector<Tensor>, Tensor> spectral_norm(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                      std::vector<Tensor> vs, std::vector<int64_t> dims,
                                                      int64_t n_power_iterations, double eps) {
  SpectralCall call("spectral_norm", weights, dims);
  STD_TORCH_CHECK(us.size() == weights.size() && vs.size() == weights.size(), "spectral_norm: expected a u and a v of every weight");
  Tensor state = empty({call.state_elements}, call.dtype);
  call.place(state.mutable_data_ptr());
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    cpu::SpectralMatrix& m = call.matrices[i];
    check(us[i], call.op, "u", {m.rows}, call.dtype);
    check(vs[i], call.op, "v", {m.columns()}, call.dtype);
    STD_TORCH_CHECK(us[i].is_contiguous() && vs[i].is_contiguous(), "spectral_norm: u and v must be contiguous");
    std::memcpy(m.u, us[i].const_data_ptr(), m.rows * call.element());
    std::memcpy(m.v, vs[i].const_data_ptr(), m.columns() * call.element());
    ys.push_back(empty(shape_of(weights[i]), call.dtype));
    m.out = ys.back().mutable_data_ptr();
  }
  cpu::spectral_norm(call.matrices, call.kernel(), n_power_iterations, eps, torch_threads());
  if (n_power_iterations)
    for (size_t i = 0; i < weights.size(); ++i) {
      const cpu::SpectralMatrix& m = call.matrices[i];
      std::memcpy(us[i].mutable_data_ptr(), m.u, m.rows * call.element());
      std::memcpy(vs[i].mutable_data_ptr(), m.v, m.columns() * call.element());
    }
  return {ys, state};
}

// The gradients of the weights that dys has a gradient of; an empty tensor for the others.
std::vector<Tensor> spectral_norm_bwd(std::vector<MaybeTensor> dys, std::vector<Tensor> weights, const Tensor& state,
                                      std::vector<int64_t> dims) {
  SpectralCall call("spectral_norm_bwd", weights, dims);
  check(state, call.op, "state", {call.state_elements}, call.dtype);
  STD_TORCH_CHECK(dys.size() == weights.size() && state.is_contiguous(), "spectral_norm_bwd: expected a dy of every weight");
  call.place(const_cast<void*>(state.const_data_ptr()));
  std::vector<Tensor> dws;
  std::vector<Input> inputs;
  std::vector<cpu::SpectralMatrix> wanted;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Shape shape = shape_of(weights[i]);
    dws.push_back(empty(dys[i] ? shape : Shape{0}, call.dtype));
    if (!dys[i]) continue;
    inputs.emplace_back(*dys[i], call.op, "dy", shape, call.dtype);
    call.matrices[i].dy = inputs.back().data();
    call.matrices[i].out = dws.back().mutable_data_ptr();
    wanted.push_back(call.matrices[i]);
  }
  cpu::spectral_norm_bwd(wanted, call.kernel(), torch_threads());
  return dws;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_bwd", TORCH_BOX(&spectral_norm_bwd));
}

}  // namespace fuseblock::torch_cpu
