// torch.ops.fuseblock_cuda.bias_act and its derivatives: checks, outputs, launch. Semantics: csrc/cuda/bias_act.h.
#if defined(WITH_CUDA)

#include "cuda/bias_act.h"

#include <tuple>

#include "math/bias_act.h"
#include "torch/cuda_tensors.h"

namespace fuseblock::torch_cuda {
namespace {

using Launcher = int (*)(const BiasAct*, int, void*);

// One call: the operands, checked against its first full tensor, and what they are launched with.
class BiasActCall {
 public:
  BiasAct op{};

  BiasActCall(const char* name, const Tensor& x, const MaybeTensor& bias, const MaybeTensor& slope, int64_t activation,
              double negative_slope, double gain, double clamp)
      : name_(name), x_(x), device_(x) {
    STD_TORCH_CHECK(x.dim() >= 2, "fuseblock::", name, ": expected x with 2 dimensions or more, got ", x.dim());
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::elu), "fuseblock::", name,
                    ": unknown activation ", activation);
    op.channels = x.size(1);
    const int64_t positions = x.numel() > 0 ? x.numel() / (x.size(0) * op.channels) : 0;
    op.channels_last = positions <= 1 || !x.is_contiguous();
    op.samples = op.channels_last ? 1 : x.size(0);
    op.size = op.channels_last ? x.size(0) * positions : positions;
    op.activation = static_cast<int>(activation);
    op.negative_slope = negative_slope;
    op.gain = gain;
    op.clamp = clamp;
    op.bias = values(bias, "bias");
    op.slope = values(slope, "slope");
    check_dense(x, "the first tensor");
  }

  bool is_kept() const { return keeps_x(static_cast<Activation>(op.activation)); }

  // A tensor of x's shape, dtype and layout.
  const void* full(const MaybeTensor& t, const char* what) const {
    STD_TORCH_CHECK(t.has_value(), "fuseblock::", name_, ": ", what, " is missing");
    bool same = t->dim() == x_.dim() && t->scalar_type() == x_.scalar_type() && on_device(*t);
    for (int64_t d = 0; same && d < x_.dim(); ++d) same = t->size(d) == x_.size(d);
    STD_TORCH_CHECK(same, "fuseblock::", name_, ": ", what, " must have the shape, dtype and device of the others");
    check_dense(*t, what);
    return t->data_ptr();
  }

  // A value a channel, in the state dtype.
  const void* values(const MaybeTensor& t, const char* what) const {
    if (!t.has_value()) return nullptr;
    const bool fits = t->scalar_type() == state_dtype(x_) && t->numel() == op.channels && t->is_contiguous() && on_device(*t);
    STD_TORCH_CHECK(fits, "fuseblock::", name_, ": expected ", what, " with ", op.channels,
                    " contiguous elements of float32 (float64)");
    return t->data_ptr();
  }

  int64_t mask_bytes() const {
    const MaskKind kind = mask_kind(static_cast<Activation>(op.activation), op.clamp);
    return mask_planes(kind) * ((x_.numel() + 7) / 8);
  }
  void set_mask(const MaybeTensor& mask) {
    const int64_t wanted = mask_bytes();
    if (wanted == 0) return;
    const bool fits = mask.has_value() && mask->scalar_type() == ScalarType::Byte && mask->numel() == wanted &&
                      mask->is_contiguous() && on_device(*mask);
    STD_TORCH_CHECK(fits, "fuseblock::", name_, ": expected a mask of ", wanted, " contiguous bytes");
    op.mask = static_cast<const uint8_t*>(mask->data_ptr());
  }

  Tensor fresh() const { return torch::stable::empty_like(x_); }

  // Zeros, which stay where there are no elements; none if not wanted.
  Tensor fresh_sums(bool wanted) const {
    return torch::stable::new_zeros(x_, {wanted ? op.channels : 0}, state_dtype(x_));
  }

  void launch(Launcher launcher) {
    const bool prelu = op.activation == static_cast<int>(Activation::prelu), wanted = op.sums || op.slope_sums;
    const int64_t rows = wanted ? (prelu ? 2 : 1) * bias_act_splits(&op) : 0;
    Tensor partials = torch::stable::new_empty(x_, {rows, op.channels}, state_dtype(x_));
    op.partials = wanted ? partials.data_ptr() : nullptr;
    check_launch(launcher(&op, dtype_number(x_, name_), device_.stream()), name_);
  }

 private:
  bool on_device(const Tensor& t) const { return t.is_cuda() && t.get_device_index() == x_.get_device_index(); }

  // Contiguous, or with the channels last, as x.
  void check_dense(const Tensor& t, const char* what) const {
    int64_t expected = x_.is_contiguous() ? 1 : op.channels;
    bool dense = true;
    for (int64_t d = t.dim(); x_.numel() > 0 && d-- > 0;) {
      const bool is_channel = d == 1 && !x_.is_contiguous();
      dense = dense && (t.size(d) == 1 || t.stride(d) == (is_channel ? 1 : expected));
      if (!is_channel) expected *= t.size(d);
    }
    STD_TORCH_CHECK(dense, "fuseblock::", name_, ": ", what, " must be contiguous or channels-last, as the others");
  }

  const char* name_;
  Tensor x_;
  OnDeviceOf device_;
};

void* data_or_null(const Tensor& x) { return x.numel() > 0 ? x.data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> bias_act(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& slope, int64_t activation,
                                    double negative_slope, double gain, double clamp, bool save) {
  BiasActCall call("bias_act", x, bias, slope, activation, negative_slope, gain, clamp);
  Tensor y = call.fresh();
  Tensor mask = torch::stable::new_empty(x, {save ? call.mask_bytes() : 0}, ScalarType::Byte);
  call.op.x = x.data_ptr();
  call.op.out = y.data_ptr();
  call.op.new_mask = static_cast<uint8_t*>(data_or_null(mask));
  call.launch(launch_bias_act_fwd);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_bwd(const Tensor& dy, const MaybeTensor& x, const MaybeTensor& bias,
                                                const MaybeTensor& slope, const MaybeTensor& mask, int64_t activation,
                                                double negative_slope, double gain, double clamp, bool need_dbias) {
  BiasActCall call("bias_act_bwd", dy, bias, slope, activation, negative_slope, gain, clamp);
  call.set_mask(mask);
  Tensor dx = call.fresh(), dbias = call.fresh_sums(need_dbias), dslope = call.fresh_sums(slope.has_value());
  call.op.dy = dy.data_ptr();
  call.op.x = call.is_kept() ? call.full(x, "x") : nullptr;
  call.op.out = dx.data_ptr();
  call.op.sums = data_or_null(dbias);
  call.op.slope_sums = data_or_null(dslope);
  call.launch(launch_bias_act_bwd);
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
  const bool kept = call.is_kept();
  Tensor a_dy = call.fresh(), a_x = kept ? call.fresh() : call.fresh_sums(false);
  Tensor a_bias = call.fresh_sums(kept), a_slope = call.fresh_sums(slope.has_value());
  call.op.v = v.data_ptr();
  call.op.v_bias = call.values(v_bias, "v_bias");
  call.op.v_slope = slope.has_value() ? call.values(v_slope, "v_slope") : nullptr;
  call.op.out = a_dy.data_ptr();
  if (kept) {
    call.op.dy = call.full(dy, "dy");
    call.op.x = call.full(x, "x");
    call.op.a_x = a_x.data_ptr();
  }
  call.op.sums = data_or_null(a_bias);
  call.op.slope_sums = data_or_null(a_slope);
  call.launch(launch_bias_act_bwd_bwd);
  return {a_dy, a_x, a_bias, a_slope};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fuseblock_cuda, m) {
  m.def(
      "bias_act(Tensor x, Tensor? bias, Tensor? slope, int activation, float negative_slope, float gain, float clamp,"
      " bool save) -> (Tensor, Tensor)");
  m.def(
      "bias_act_bwd(Tensor dy, Tensor? x, Tensor? bias, Tensor? slope, Tensor? mask, int activation,"
      " float negative_slope, float gain, float clamp, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "bias_act_bwd_bwd(Tensor v, Tensor? v_bias, Tensor? v_slope, Tensor? dy, Tensor? x, Tensor? bias, Tensor? slope,"
      " Tensor? mask, int activation, float negative_slope, float gain, float clamp) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cuda, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_bwd", TORCH_BOX(&bias_act_bwd));
  m.impl("bias_act_bwd_bwd", TORCH_BOX(&bias_act_bwd_bwd));
}

}  // namespace
}  // namespace fuseblock::torch_cuda

#endif
