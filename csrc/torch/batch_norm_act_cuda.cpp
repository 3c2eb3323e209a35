// CUDA operators of batch_norm_act, called by python/fuseblock/launch/cuda_batch_norm_act.py: the six kernels, and forward and
// backward as wholes.
#if defined(WITH_CUDA)

#include "cuda/batch_norm_act.h"

#include <tuple>

#include "math/pointwise.h"
#include "torch/cuda_tensors.h"

namespace fuseblock::torch_cuda {
namespace {

using Launcher = int (*)(const BatchNormAct*, int, void*);
using WholeLauncher = int (*)(const BatchNormAct*, int, const DeviceLimits*, void*);

// One call: the operands, checked against x, and what they are launched with.
class NormCall {
 public:
  NormCall(const char* name, const Tensor& x, bool per_sample) : op{}, name_(name), x_(x), device_(x), per_sample_(per_sample) {
    STD_TORCH_CHECK(x.dim() >= 2, "fuseblock::", name, ": expected x with 2 dimensions or more, got ", x.dim());
    const int64_t samples = x.size(0), channels = x.size(1);
    const int64_t positions = channels > 0 && samples > 0 ? x.numel() / (samples * channels) : 0;
    op.channels_last = (positions == 1 && !per_sample) || !x.is_contiguous();
    STD_TORCH_CHECK(!op.channels_last || positions == 0 || is_channels_last(x), "fuseblock::", name,
                    ": expected x contiguous or channels-last");
    const bool folded = per_sample != op.channels_last;  // samples into channels, or into positions
    op.samples = folded ? 1 : samples;
    op.channels = per_sample && folded ? samples * channels : channels;
    op.size = op.channels_last && folded ? samples * positions : positions;
    op.x = x.data_ptr();
    count_ = per_sample ? samples * channels : channels;
  }

  // A tensor of x's shape, dtype and strides.
  const void* like_x(const MaybeTensor& t, const char* what) const {
    if (!t.has_value()) return nullptr;
    bool same = t->dim() == x_.dim() && t->scalar_type() == x_.scalar_type() && on_device(*t);
    for (int64_t d = 0; same && d < x_.dim(); ++d) {
      same = t->size(d) == x_.size(d) && (t->size(d) == 1 || t->stride(d) == x_.stride(d));
    }
    STD_TORCH_CHECK(same, "fuseblock::", name_, ": ", what, " must have the shape, dtype, device and strides of x");
    return t->data_ptr();
  }

  // `count` contiguous values in the dtype of the statistics.
  const void* values(const MaybeTensor& t, const char* what, int64_t count) const {
    if (!t.has_value()) return nullptr;
    const bool fits = t->scalar_type() == state_dtype(x_) && t->numel() == count && t->is_contiguous() && on_device(*t);
    STD_TORCH_CHECK(fits, "fuseblock::", name_, ": expected ", what, " with ", count, " contiguous elements of float32 (float64)");
    return t->data_ptr();
  }

  void set_site(const MaybeTensor& mean, const MaybeTensor& invstd, const MaybeTensor& weight, const MaybeTensor& bias,
                const MaybeTensor& residual, const MaybeTensor& mask, const MaybeTensor& slope, int64_t activation,
                double negative_slope) {
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::elu), "fuseblock::", name_,
                    ": unknown activation ", activation);
    STD_TORCH_CHECK(!per_sample_ || (!residual.has_value() && !mask.has_value()), "fuseblock::", name_,
                    ": statistics per sample go without a residual");
    op.mean = values(mean, "mean", count_);
    op.invstd = values(invstd, "invstd", count_);
    op.weight = values(weight, "weight", count_);
    op.bias = values(bias, "bias", count_);
    op.residual = like_x(residual, "residual");
    op.slope_stride = slope.has_value() && slope->numel() != 1 ? 1 : 0;
    op.slope = values(slope, "slope", op.slope_stride == 0 ? 1 : count_);
    op.activation = static_cast<int>(activation);
    op.negative_slope = negative_slope;
    if (mask.has_value()) {
      const bool fits = mask->scalar_type() == ScalarType::Byte && mask->numel() == mask_bytes() && mask->is_contiguous() &&
                        on_device(*mask);
      STD_TORCH_CHECK(fits, "fuseblock::", name_, ": expected mask with ", mask_bytes(), " contiguous bytes");
      op.mask = static_cast<const uint8_t*>(mask->data_ptr());
    }
  }

  int64_t mask_bytes() const { return (x_.numel() + 7) / 8; }
  // Has the kernel write a mask, if wanted; else it is empty.
  Tensor new_mask(bool wanted) {
    STD_TORCH_CHECK(!wanted || !per_sample_, "fuseblock::", name_, ": statistics per sample go without a mask");
    Tensor mask = fresh({wanted ? mask_bytes() : 0}, ScalarType::Byte);
    if (wanted) op.new_mask = static_cast<uint8_t*>(mask.data_ptr());
    return mask;
  }
  Tensor fresh_like_x() const { return torch::stable::empty_like(x_); }
  Tensor fresh(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return torch::stable::new_empty(x_, shape, dtype);
  }

  // Channels that have statistics of their own.
  int64_t count() const { return count_; }
  Tensor per_channel(int64_t rows) const { return fresh({rows, count_}, state_dtype(x_)); }

  // Runs a reduction; its sums (rows, channels).
  Tensor reduce(Launcher launcher, int64_t rows) {
    if (x_.numel() == 0) return torch::stable::new_zeros(x_, {rows, count_}, state_dtype(x_));
    Tensor sums = per_channel(rows);
    op.sums = sums.data_ptr();
    const Tensor workspace = with_workspace();
    run(launcher);
    return sums;
  }

  // What reductions of several blocks need; kept until the launch.
  Tensor with_workspace() {
    const int64_t splits = x_.numel() == 0 ? 0 : batch_norm_act_splits(&op);
    Tensor workspace = fresh({splits > 1 ? splits * 12 * count_ : 0}, state_dtype(x_));
    op.workspace = workspace.data_ptr();
    return workspace;
  }

  void run(Launcher launcher) { check_launch(launcher(&op, dtype_number(x_, name_), device_.stream()), name_); }

  void run_whole(WholeLauncher launcher) {
    int clusters = 0, shared_bytes = 0;
    const int32_t index = x_.get_device_index();
    check_launch(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index), name_);
    check_launch(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), name_);
    const DeviceLimits limits{clusters != 0, true, static_cast<size_t>(shared_bytes)};
    check_launch(launcher(&op, dtype_number(x_, name_), &limits, device_.stream()), name_);
  }

  BatchNormAct op;

 private:
  static bool is_channels_last(const Tensor& x) {
    int64_t expected = x.size(1);
    if (x.size(1) != 1 && x.stride(1) != 1) return false;
    for (int64_t n = x.dim(); n-- > 0;) {
      // The last dimension varies fastest after the channels, the first one slowest.
      if (n == 1) continue;
      if (x.size(n) != 1 && x.stride(n) != expected) return false;
      expected *= x.size(n);
    }
    return true;
  }

  bool on_device(const Tensor& t) const { return t.is_cuda() && t.get_device_index() == x_.get_device_index(); }

  const char* name_;
  const Tensor& x_;
  OnDeviceOf device_;
  bool per_sample_;
  int64_t count_;
};

constexpr int kPrelu = 3;  // enum class Activation

Tensor batch_norm_act_stats(const Tensor& x, bool per_sample) {
  NormCall call("batch_norm_act_stats", x, per_sample);
  return call.reduce(launch_batch_norm_act_stats, 2);
}

std::tuple<Tensor, Tensor> batch_norm_act_fwd(const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                              const MaybeTensor& residual, const MaybeTensor& slope, int64_t activation,
                                              double negative_slope, bool per_sample, bool want_mask) {
  NormCall call("batch_norm_act_fwd", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, std::nullopt, slope, activation, negative_slope);
  Tensor y = call.fresh_like_x(), mask = call.new_mask(want_mask);
  call.op.y = y.data_ptr();
  call.run(launch_batch_norm_act_fwd);
  return {y, mask};
}

Tensor batch_norm_act_bwd_reduce(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                 const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                                 const MaybeTensor& mask, const MaybeTensor& slope, int64_t activation,
                                 double negative_slope, bool per_sample) {
  NormCall call("batch_norm_act_bwd_reduce", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope);
  call.op.dy = call.like_x(dy, "dy");
  return call.reduce(launch_batch_norm_act_bwd_reduce, activation == kPrelu ? 3 : 2);
}

std::tuple<Tensor, Tensor> batch_norm_act_bwd(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                              const MaybeTensor& residual, const MaybeTensor& mask,
                                              const MaybeTensor& slope, int64_t activation, double negative_slope,
                                              bool per_sample, const Tensor& k, bool want_dresidual) {
  NormCall call("batch_norm_act_bwd", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope);
  call.op.dy = call.like_x(dy, "dy");
  call.op.k = call.values(k, "k", 3 * call.count());
  Tensor dx = call.fresh_like_x();
  Tensor dresidual = want_dresidual ? call.fresh_like_x() : call.fresh({0}, x.scalar_type());
  call.op.dx = dx.data_ptr();
  if (want_dresidual) call.op.dresidual = dresidual.data_ptr();
  call.run(launch_batch_norm_act_bwd);
  return {dx, dresidual};
}

Tensor batch_norm_act_bwd_bwd_reduce(const MaybeTensor& v, const MaybeTensor& v_residual, const Tensor& dy,
                                     const Tensor& x, const Tensor& mean, const Tensor& invstd, const MaybeTensor& weight,
                                     const MaybeTensor& bias, const MaybeTensor& residual, const MaybeTensor& mask,
                                     const MaybeTensor& slope, int64_t activation, double negative_slope,
                                     bool per_sample) {
  NormCall call("batch_norm_act_bwd_bwd_reduce", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope);
  call.op.dy = call.like_x(dy, "dy");
  call.op.v = call.like_x(v, "v");
  call.op.v_residual = call.like_x(v_residual, "v_residual");
  const int64_t sums = activation < kPrelu ? 5 : v_residual.has_value() ? 12 : 10;
  return call.reduce(launch_batch_norm_act_bwd_bwd_reduce, sums);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_bwd_bwd(
    const MaybeTensor& v, const MaybeTensor& v_residual, const Tensor& dy, const Tensor& x, const Tensor& mean,
    const Tensor& invstd, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& mask, const MaybeTensor& slope, int64_t activation, double negative_slope,
    bool per_sample, const Tensor& k) {
  NormCall call("batch_norm_act_bwd_bwd", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope);
  call.op.dy = call.like_x(dy, "dy");
  call.op.v = call.like_x(v, "v");
  call.op.v_residual = call.like_x(v_residual, "v_residual");
  call.op.k = call.values(k, "k", 9 * call.count());
  Tensor a_x = call.fresh_like_x(), a_dy = call.fresh_like_x();
  Tensor a_residual = residual.has_value() ? call.fresh_like_x() : call.fresh({0}, x.scalar_type());
  call.op.a_x = a_x.data_ptr();
  call.op.a_dy = a_dy.data_ptr();
  if (residual.has_value()) call.op.a_residual = a_residual.data_ptr();
  call.run(launch_batch_norm_act_bwd_bwd);
  return {a_x, a_dy, a_residual};
}

// Forward with the batch's statistics: (y, mean, var, invstd, mask).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_whole_fwd(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& slope, double eps, int64_t activation, double negative_slope, bool per_sample, bool want_mask) {
  NormCall call("batch_norm_act_whole_fwd", x, per_sample);
  call.set_site(std::nullopt, std::nullopt, weight, bias, residual, std::nullopt, slope, activation, negative_slope);
  const ScalarType state = state_dtype(x);
  Tensor y = call.fresh_like_x(), mask = call.new_mask(want_mask);
  Tensor mean = call.fresh({call.count()}, state), var = call.fresh({call.count()}, state);
  Tensor invstd = call.fresh({call.count()}, state);
  const Tensor workspace = call.with_workspace();
  call.op.eps = eps;
  call.op.y = y.data_ptr();
  call.op.new_mean = mean.data_ptr(), call.op.new_var = var.data_ptr(), call.op.new_invstd = invstd.data_ptr();
  call.run_whole(launch_batch_norm_act_whole_fwd);
  return {y, mean, var, invstd, mask};
}

// Backward through the batch's statistics: (dx, dresidual, sums).
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_whole_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& residual, const MaybeTensor& mask, const MaybeTensor& slope,
    int64_t activation, double negative_slope, bool per_sample, bool want_dresidual) {
  NormCall call("batch_norm_act_whole_bwd", x, per_sample);
  call.set_site(mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope);
  call.op.dy = call.like_x(dy, "dy");
  Tensor dx = call.fresh_like_x(), sums = call.per_channel(activation == kPrelu ? 3 : 2), k = call.per_channel(3);
  Tensor dresidual = want_dresidual ? call.fresh_like_x() : call.fresh({0}, x.scalar_type());
  const Tensor workspace = call.with_workspace();
  call.op.dx = dx.data_ptr(), call.op.sums = sums.data_ptr(), call.op.new_k = k.data_ptr();
  if (want_dresidual) call.op.dresidual = dresidual.data_ptr();
  call.run_whole(launch_batch_norm_act_whole_bwd);
  return {dx, dresidual, sums};
}

#define FB_SITE                                                                                                   \
  "Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? slope," \
  " int activation, float negative_slope, bool per_sample"

STABLE_TORCH_LIBRARY_FRAGMENT(fuseblock_cuda, m) {
  m.def("batch_norm_act_stats(Tensor x, bool per_sample) -> Tensor");
  m.def(
      "batch_norm_act_fwd(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual,"
      " Tensor? slope, int activation, float negative_slope, bool per_sample, bool want_mask) -> (Tensor, Tensor)");
  m.def("batch_norm_act_bwd_reduce(Tensor dy, " FB_SITE ") -> Tensor");
  m.def("batch_norm_act_bwd(Tensor dy, " FB_SITE ", Tensor k, bool want_dresidual) -> (Tensor, Tensor)");
  m.def("batch_norm_act_bwd_bwd_reduce(Tensor? v, Tensor? v_residual, Tensor dy, " FB_SITE ") -> Tensor");
  m.def(
      "batch_norm_act_bwd_bwd(Tensor? v, Tensor? v_residual, Tensor dy, " FB_SITE
      ", Tensor k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_whole_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, float eps,"
      " int activation, float negative_slope, bool per_sample, bool want_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("batch_norm_act_whole_bwd(Tensor dy, " FB_SITE ", bool want_dresidual) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cuda, CUDA, m) {
  m.impl("batch_norm_act_stats", TORCH_BOX(&batch_norm_act_stats));
  m.impl("batch_norm_act_fwd", TORCH_BOX(&batch_norm_act_fwd));
  m.impl("batch_norm_act_bwd_reduce", TORCH_BOX(&batch_norm_act_bwd_reduce));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&batch_norm_act_bwd));
  m.impl("batch_norm_act_bwd_bwd_reduce", TORCH_BOX(&batch_norm_act_bwd_bwd_reduce));
  m.impl("batch_norm_act_bwd_bwd", TORCH_BOX(&batch_norm_act_bwd_bwd));
  m.impl("batch_norm_act_whole_fwd", TORCH_BOX(&batch_norm_act_whole_fwd));
  m.impl("batch_norm_act_whole_bwd", TORCH_BOX(&batch_norm_act_whole_bwd));
}

}  // namespace
}  // namespace fuseblock::torch_cuda

#endif
