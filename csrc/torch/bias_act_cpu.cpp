// torch.ops.fuseblock_cpu.bias_act and its derivatives: checks, outputs, launch. Semantics: csrc/cpu/bias_act.h.
//
// Full tensors are dense with the channels second: contiguous, or with the channels last in memory; all have one layout.
#include "../cpu/bias_act.h"

#include <limits>
#include <tuple>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

Shape channels_last_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t step = shape[1];
  for (size_t d = shape.size(); d-- > 2;) {
    strides[d] = step;
    step *= shape[d] > 1 ? shape[d] : 1;
  }
  strides[0] = step;
  strides[1] = 1;
  return strides;
}

// What every member of the family takes: one full tensor, the parameters, the constants.
struct BiasActCall {
  const char* op;
  Shape shape, strides;
  ScalarType dtype, state;
  bool contiguous;
  cpu::BiasActSite site;
  std::optional<Input> bias, slope;

  BiasActCall(const char* op, const Tensor& x, const MaybeTensor& b, const MaybeTensor& a, int64_t activation,
              double negative_slope, double gain, double clamp)
      : op(op), shape(shape_of(x)), dtype(x.scalar_type()), state(state_type(dtype)), contiguous(x.is_contiguous()) {
    check_isa(op);
    STD_TORCH_CHECK(shape.size() >= 2 && shape.size() <= 8, op, ": x must have shape (N, C, ...), got ", text(shape));
    STD_TORCH_CHECK(activation >= 0 && activation <= (int64_t)Activation::elu, op, ": unknown activation ", activation);
    const auto given = x.strides();
    strides.assign(given.begin(), given.end());
    site = {kernel_dtype(x, op, "x"), (Activation)activation, x.numel(), shape[1], 1, negative_slope, gain, clamp};
    STD_TORCH_CHECK(keeps_x() || !a, op, ": slope belongs to prelu");
    if (contiguous) {
      for (size_t d = 2; d < shape.size(); ++d) site.inner *= shape[d];
    }
    if (site.count == 0) site.inner = 1;
    full(x, "x");
    site.bias = bias.emplace(b, op, "bias", channels(), state).data();
    site.slope = slope.emplace(a, op, "slope", channels(), state).data();
  }

  Shape channels() const { return {shape[1]}; }
  bool keeps_x() const { return fuseblock::keeps_x(site.activation); }

  // The data of a full tensor, whose layout must be that of the first one.
  const void* full(const Tensor& x, const char* name) const {
    check(x, op, name, shape, dtype);
    const Shape wanted = contiguous ? contiguous_strides(shape) : channels_last_strides(shape);
    for (size_t d = 0; d < shape.size() && site.count > 0; ++d) {
      STD_TORCH_CHECK(shape[d] == 1 || x.stride((int64_t)d) == wanted[d], op, ": ", name,
                      " must be contiguous or channels-last, as the other tensors");
    }
    return x.const_data_ptr();
  }
  const void* full(const MaybeTensor& x, const char* name) const {
    STD_TORCH_CHECK(x.has_value(), op, ": ", name, " is missing");
    return full(*x, name);
  }

  Tensor fresh() const { return empty_strided(shape, strides, dtype); }
  Tensor fresh_sums(bool wanted) const { return empty({wanted ? shape[1] : 0}, state); }

  int64_t mask_bytes() const {
    return mask_planes(mask_kind(site.activation, site.clamp)) * ((site.count + 7) / 8);
  }
  void set_mask(const MaybeTensor& mask) {
    const int64_t wanted = mask_bytes();
    if (wanted == 0) return;
    STD_TORCH_CHECK(mask && mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Byte &&
                        mask->numel() == wanted,
                    op, ": mask must hold ", wanted, " bytes");
    site.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
};

std::tuple<Tensor, Tensor> bias_act(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& slope, int64_t activation,
                                    double negative_slope, double gain, double clamp, bool save) {
  const BiasActCall call("bias_act", x, bias, slope, activation, negative_slope, gain, clamp);
  Tensor y = call.fresh(), mask = bytes(save ? call.mask_bytes() : 0);
  uint8_t* const to = mask.numel() ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  cpu::bias_act({call.site, x.const_data_ptr(), y.mutable_data_ptr(), to}, torch_threads());
  return {y, mask};
}

// LeakyReLU written over x; the mask that bias_act would have saved. Every element is read before it is written.
Tensor leaky_relu_(const Tensor& x, double negative_slope) {
  const BiasActCall call("leaky_relu_", x, {}, {}, (int64_t)Activation::leaky_relu, negative_slope, 1,
                         std::numeric_limits<double>::infinity());
  Tensor mask = bytes(call.mask_bytes());
  cpu::bias_act({call.site, x.const_data_ptr(), x.mutable_data_ptr(), static_cast<uint8_t*>(mask.mutable_data_ptr())},
                torch_threads());
  return mask;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_bwd(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& bias,
                                                const MaybeTensor& slope, const MaybeTensor& mask, int64_t activation,
                                                double negative_slope, double gain, double clamp, bool need_dbias) {
  BiasActCall call("bias_act_bwd", dy, bias, slope, activation, negative_slope, gain, clamp);
  call.set_mask(mask);
  const void* const kept = call.keeps_x() ? call.full(x, "x") : nullptr;
  Tensor dx = call.fresh(), dbias = call.fresh_sums(need_dbias), dslope = call.fresh_sums(slope.has_value());
  cpu::bias_act_bwd({call.site, dy.const_data_ptr(), kept, dx.mutable_data_ptr(),
                     need_dbias ? dbias.mutable_data_ptr() : nullptr, slope ? dslope.mutable_data_ptr() : nullptr},
                    torch_threads());
  return {dx, dbias, dslope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bias_act_bwd_bwd(const Tensor& v, const MaybeTensor& v_bias,
                                                            const MaybeTensor& v_slope, const MaybeTensor& dy,
                                                            const MaybeTensor& x, const MaybeTensor& bias,
                                                            const MaybeTensor& slope, const MaybeTensor& mask,
                                                            int64_t activation, double negative_slope, double gain,
                                                            double clamp) {
  BiasActCall call("bias_act_bwd_bwd", v, bias, slope, activation, negative_slope, gain, clamp);
  call.set_mask(mask);
  const Input along_bias(v_bias, call.op, "v_bias", call.channels(), call.state);
  const Input along_slope(v_slope, call.op, "v_slope", slope ? call.channels() : Shape{0}, call.state);
  const bool keeps_x = call.keeps_x();
  Tensor a_dy = call.fresh(), a_x = keeps_x ? call.fresh() : call.fresh_sums(false);
  Tensor a_bias = call.fresh_sums(keeps_x), a_slope = call.fresh_sums(slope.has_value());
  cpu::BiasActBwdBwdArgs args{call.site, v.const_data_ptr(), along_bias.data(), slope ? along_slope.data() : nullptr};
  args.a_dy = a_dy.mutable_data_ptr();
  if (keeps_x) {
    args.dy = call.full(dy, "dy");
    args.x = call.full(x, "x");
    args.a_x = a_x.mutable_data_ptr();
    args.a_bias = a_bias.mutable_data_ptr();
    args.a_slope = slope ? a_slope.mutable_data_ptr() : nullptr;
  }
  cpu::bias_act_bwd_bwd(args, torch_threads());
  return {a_dy, a_x, a_bias, a_slope};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("leaky_relu_", TORCH_BOX(&leaky_relu_));
  m.impl("bias_act_bwd", TORCH_BOX(&bias_act_bwd));
  m.impl("bias_act_bwd_bwd", TORCH_BOX(&bias_act_bwd_bwd));
}

}  // namespace fuseblock::torch_cpu
