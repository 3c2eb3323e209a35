// torch.ops.fuseblock_cpu.batch_norm_act, its derivatives and its six kernels: checks, outputs, launch. Semantics:
// csrc/cpu/batch_norm_act.h, python/fuseblock/launch/batch_norm_act.py. Full tensors are dense, contiguous or channels-last,
// and all of one layout.
#include "../cpu/batch_norm_act.h"

#include <cmath>
#include <tuple>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

// (C,) or (1,) values of any floating point type.
class ChannelValues {
 public:
  ChannelValues(const MaybeTensor& t, const char* op, const char* name, int64_t channels, ScalarType state,
                bool one_for_all = false) {
    if (!t) return;
    if (t->scalar_type() != state) kernel_dtype(*t, op, name);  // refuses integers
    const Tensor wide = t->scalar_type() == state ? *t : torch::stable::to(*t, state);
    step_ = one_for_all && channels != 1 && t->dim() == 1 && t->size(0) == 1 ? 0 : 1;
    values_.emplace(wide, op, name, Shape{step_ ? channels : 1}, state);
    is_double_ = state == ScalarType::Double;
  }
  double operator()(int64_t c, double absent) const {
    if (!values_) return absent;
    const void* const p = values_->data();
    return is_double_ ? static_cast<const double*>(p)[c * step_] : static_cast<const float*>(p)[c * step_];
  }
  explicit operator bool() const { return values_.has_value(); }
  bool one_for_all() const { return step_ == 0; }

 private:
  std::optional<Input> values_;
  int64_t step_ = 1;
  bool is_double_ = false;
};

// A (rows, C) or (C,) output in the dtype of the statistics.
class ChannelOutput {
 public:
  ChannelOutput(const Shape& shape, ScalarType state)
      : tensor(empty(shape, state)), channels_(shape.back()), data_(tensor.mutable_data_ptr()),
        is_double_(state == ScalarType::Double) {}
  void set(int64_t row, int64_t c, double value) {
    if (is_double_) static_cast<double*>(data_)[row * channels_ + c] = value;
    else static_cast<float*>(data_)[row * channels_ + c] = (float)value;
  }
  // The tensor, in the dtype of what it is the gradient of; (1,) where that is one value for all channels.
  Tensor like(const MaybeTensor& t, const ChannelValues& values) const {
    const Tensor whole = values.one_for_all() ? torch::stable::sum(tensor, std::vector<int64_t>{0}, true) : tensor;
    return !t || whole.scalar_type() == t->scalar_type() ? whole : torch::stable::to(whole, t->scalar_type());
  }
  Tensor tensor;

 private:
  int64_t channels_;
  void* data_;
  bool is_double_;
};

struct NormProblem {
  const char* op;
  Shape shape, strides;
  ScalarType dtype, state;
  cpu::NormCall call = {};

  // per_sample: the channels of every sample are channels of their own, as in instance norm.
  NormProblem(const char* op, const Tensor& x, int64_t activation, bool per_sample = false)
      : op(op), shape(shape_of(x)), dtype(x.scalar_type()), state(state_type(dtype)) {
    check_isa(op);
    STD_TORCH_CHECK(shape.size() >= 2 && shape.size() <= 8, op, ": x must have shape (N, C, ...), got ", text(shape));
    STD_TORCH_CHECK(activation >= 0 && activation <= (int64_t)Activation::elu, op, ": unknown activation ", activation);
    const auto given = x.strides();
    strides.assign(given.begin(), given.end());
    call.dtype = kernel_dtype(x, op, "x");
    call.activation = (Activation)activation;
    call.N = shape[0], call.C = shape[1], call.S = 1;
    for (size_t d = 2; d < shape.size(); ++d) call.S *= shape[d];
    call.channels_last = call.S == 1 || !x.is_contiguous();
    if (!x.is_contiguous() && x.numel() > 0) {
      int64_t step = call.C;
      for (size_t d = shape.size(); d-- > 0;) {
        const int64_t wanted = d == 1 ? 1 : step;
        STD_TORCH_CHECK(shape[d] == 1 || strides[d] == wanted, op, ": x must be contiguous or channels-last");
        if (d != 1) step *= shape[d];
      }
    }
    if (per_sample && call.channels_last) call.samples = call.N, call.N = call.S, call.S = 1;
    else if (per_sample) call.C *= call.N, call.N = 1;
    else if (call.channels_last) call.N *= call.S, call.S = 1;
    call.x = full(x, "x");
  }

  int64_t channels() const { return call.samples * call.C; }
  double values_per_channel() const { return (double)call.N * (double)call.S; }
  bool is_prelu() const { return call.activation == Activation::prelu; }
  bool is_curved() const { return is_prelu() || is_smooth(call.activation); }

  const void* full(const Tensor& t, const char* name) const {
    check(t, op, name, shape, dtype);
    for (size_t d = 0; d < shape.size() && t.numel() > 0; ++d)
      STD_TORCH_CHECK(shape[d] == 1 || t.stride((int64_t)d) == strides[d], op, ": ", name, " must have the layout of x");
    return t.const_data_ptr();
  }
  const void* full(const MaybeTensor& t, const char* name) const { return t ? full(*t, name) : nullptr; }

  Tensor fresh(bool wanted = true) const { return wanted ? empty_strided(shape, strides, dtype) : empty({0}, dtype); }
  int64_t mask_bytes() const { return (call.N * call.C * call.S + 7) / 8; }

  template <class F>
  void run(cpu::NormSums what, int64_t sums, cpu::NormResult result, F&& finish) const {
    if (channels() == 0) return;
    const auto call_finish = [](void* f, int64_t c, const double* s, double* o) { (*static_cast<F*>(f))(c, s, o); };
    cpu::batch_norm_act(call, what, sums, result, {call_finish, &finish}, torch_threads());
  }
};

// A problem with its affine operands, statistics given.
struct NormSite : NormProblem {
  ChannelValues mean, invstd, weight, bias, slope;
  double negative_slope;

  NormSite(const char* op, const Tensor& x, const MaybeTensor& mean, const MaybeTensor& invstd, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& residual, const MaybeTensor& mask, const MaybeTensor& slope,
           int64_t activation, double negative_slope, bool per_sample = false)
      : NormProblem(op, x, activation, per_sample),
        mean(mean, op, "mean", channels(), state),
        invstd(invstd, op, "invstd", channels(), state),
        weight(weight, op, "weight", channels(), state),
        bias(bias, op, "bias", channels(), state),
        slope(slope, op, "slope", channels(), state, true),
        negative_slope(negative_slope) {
    STD_TORCH_CHECK(is_prelu() == slope.has_value(), op, ": slope belongs to prelu");
    STD_TORCH_CHECK(!per_sample || (!residual && !mask), op, ": statistics per sample take no residual");
    call.residual = full(residual, "residual");
    if (!mask) return;
    STD_TORCH_CHECK(mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Byte &&
                        mask->numel() == mask_bytes(),
                    op, ": mask must hold ", mask_bytes(), " bytes");
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }

  // All operands but the coefficients.
  void set(int64_t c, double* operands) const { set(c, mean(c, 0), invstd(c, 1), operands); }
  void set(int64_t c, double own_mean, double own_invstd, double* operands) const {
    operands[cpu::kMean] = own_mean;
    operands[cpu::kInvstd] = own_invstd;
    operands[cpu::kWeight] = weight(c, 1);
    operands[cpu::kBias] = bias(c, 0);
    const double fixed = call.activation == Activation::leaky_relu ? negative_slope : 1;
    operands[cpu::kSlope] = is_prelu() ? slope(c, 0) : fixed;
  }
};

#define FB_SITE                                                                                                         \
  const Tensor &mean, const Tensor &invstd, const MaybeTensor &weight, const MaybeTensor &bias,                        \
      const MaybeTensor &residual, const MaybeTensor &mask, const MaybeTensor &slope, int64_t activation,               \
      double negative_slope
#define FB_SITE_OF(op, x) op, x, mean, invstd, weight, bias, residual, mask, slope, activation, negative_slope

// A running statistic that moves towards a batch's.
class Running {
 public:
  Running(const MaybeTensor& t, const NormProblem& p, const char* name, double momentum) : momentum_(momentum) {
    if (!t) return;
    check(*t, p.op, name, {p.channels()}, p.state);
    STD_TORCH_CHECK(t->is_contiguous(), p.op, ": ", name, " must be contiguous");
    tensor_ = *t;
    data_ = tensor_->mutable_data_ptr();
    is_double_ = p.state == ScalarType::Double;
  }
  void move(int64_t c, double value) {
    if (!data_) return;
    if (is_double_) move(static_cast<double*>(data_)[c], value);
    else move(static_cast<float*>(data_)[c], value);
  }

 private:
  MaybeTensor tensor_;
  void* data_ = nullptr;
  double momentum_;
  bool is_double_ = false;
  template <class T>
  void move(T& at, double value) { at = (T)((1 - momentum_) * at + momentum_ * value); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& slope, const MaybeTensor& given_mean, const MaybeTensor& given_var, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, int64_t activation, double negative_slope, bool training,
    bool want_mask, bool per_sample) {
  NormSite p("batch_norm_act", x, given_mean, std::nullopt, weight, bias, residual, std::nullopt, slope, activation,
             negative_slope, per_sample);
  STD_TORCH_CHECK(!want_mask || residual, p.op, ": a mask belongs to a residual");
  const ChannelValues known_var(given_var, p.op, "var", p.channels(), p.state);
  STD_TORCH_CHECK((bool)p.mean == (bool)known_var && (training || known_var), p.op, ": mean and var belong together");
  ChannelOutput mean({p.channels()}, p.state), var({p.channels()}, p.state), invstd({p.channels()}, p.state), count({1}, p.state);
  Running moving_mean(running_mean, p, "running_mean", momentum), moving_var(running_var, p, "running_var", momentum);
  Tensor y = p.fresh(), mask = bytes(want_mask ? p.mask_bytes() : 0);
  p.call.result = y.mutable_data_ptr();
  if (want_mask) p.call.mask_result = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const double n = p.values_per_channel();
  count.set(0, 0, n);
  const cpu::NormSums what = known_var ? cpu::NormSums::none : cpu::NormSums::stats;
  p.run(what, 2, cpu::NormResult::forward, [&](int64_t c, const double* sums, double* operands) {
    const double own_mean = sums ? sums[0] : p.mean(c, 0), own_var = sums ? sums[1] / n : known_var(c, 1);
    const double scale = 1 / std::sqrt(own_var + eps);
    mean.set(0, c, own_mean);
    var.set(0, c, own_var);
    invstd.set(0, c, scale);
    moving_mean.move(c, own_mean);
    moving_var.move(c, own_var * (n / (n - 1)));
    p.set(c, own_mean, scale, operands);
  });
  return {y, mean.tensor, var.tensor, invstd.tensor, torch::stable::view(count.tensor, {}), mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_bwd(const Tensor& dy, const Tensor& x, FB_SITE,
                                                                      bool training, bool want_dx, bool want_sums,
                                                                      bool want_dresidual, bool per_sample) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd", x), per_sample);
  p.call.dy = p.full(dy, "dy");
  Tensor dx = p.fresh(want_dx), dresidual = p.fresh(want_dresidual);
  ChannelOutput dweight({want_sums && weight ? p.channels() : 0}, p.state);
  ChannelOutput dbias({want_sums && bias ? p.channels() : 0}, p.state);
  ChannelOutput dslope({want_sums && slope ? p.channels() : 0}, p.state);
  if (want_dx) p.call.result = dx.mutable_data_ptr();
  if (want_dresidual) p.call.result2 = dresidual.mutable_data_ptr();
  const double per_value = training ? 1 / p.values_per_channel() : 0;
  p.run(want_sums || (training && want_dx) ? cpu::NormSums::backward : cpu::NormSums::none, p.is_prelu() ? 3 : 2,
        want_dx || want_dresidual ? cpu::NormResult::backward : cpu::NormResult::none,
        [&](int64_t c, const double* sums, double* operands) {
          p.set(c, operands);
          const double scale = operands[cpu::kWeight] * operands[cpu::kInvstd];
          double* const k = operands + cpu::kFirstCoefficient;
          k[0] = scale;
          if (!sums) return;
          k[1] = -scale * sums[0] * per_value;
          k[2] = -scale * sums[1] * per_value;
          if (!want_sums) return;
          if (weight) dweight.set(0, c, sums[1]);
          if (bias) dbias.set(0, c, sums[0]);
          if (slope) dslope.set(0, c, sums[2]);
        });
  return {dx, dweight.like(weight, p.weight), dbias.like(bias, p.bias),
          want_sums ? dslope.like(slope, p.slope) : dslope.tensor, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_bwd_bwd(
    const MaybeTensor& v_dx, const MaybeTensor& v_dweight, const MaybeTensor& v_dbias, const MaybeTensor& v_dslope,
    const MaybeTensor& v_dresidual, const Tensor& dy, const Tensor& x, FB_SITE, bool training,
    bool per_sample) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd_bwd", x), per_sample);
  p.call.dy = p.full(dy, "dy");
  p.call.v = p.full(v_dx, "v_dx");
  p.call.v_r = p.full(v_dresidual, "v_dresidual");
  const ChannelValues v_w(v_dweight, p.op, "v_dweight", p.channels(), p.state);
  const ChannelValues v_b(v_dbias, p.op, "v_dbias", p.channels(), p.state);
  const ChannelValues v_a(v_dslope, p.op, "v_dslope", p.channels(), p.state, true);
  const bool curved = p.is_curved();
  Tensor a_dy = p.fresh(), a_x = p.fresh(), a_residual = p.fresh(curved && residual);
  ChannelOutput a_weight({weight ? p.channels() : 0}, p.state), a_bias({curved && bias ? p.channels() : 0}, p.state);
  ChannelOutput a_slope({slope ? p.channels() : 0}, p.state);
  p.call.result = a_x.mutable_data_ptr();
  p.call.result2 = a_dy.mutable_data_ptr();
  if (curved && residual) p.call.result3 = a_residual.mutable_data_ptr();
  const double n = p.values_per_channel();
  p.run(cpu::NormSums::second_order, curved ? 12 : 5, cpu::NormResult::second_order,
        [&](int64_t c, const double* sums, double* operands) {
          p.set(c, operands);
          if (!sums) return;
          const cpu::NormAdjoints a =
              cpu::second_order_of_channel(sums, v_w(c, 0), v_b(c, 0), v_a(c, 0), operands[cpu::kWeight],
                                           operands[cpu::kInvstd], n, is_smooth(p.call.activation), training);
          for (int64_t j = 0; j < cpu::kNormCoefficients; ++j) operands[cpu::kFirstCoefficient + j] = a.k[j];
          if (weight) a_weight.set(0, c, a.weight);
          if (curved && bias) a_bias.set(0, c, a.bias);
          if (slope) a_slope.set(0, c, a.slope);
        });
  return {a_dy, a_x, a_weight.like(weight, p.weight), a_bias.like(bias, p.bias), a_residual, a_slope.like(slope, p.slope)};
}

// ---- the six kernels, for statistics that are shared between processes -----------------------------------------------

Tensor stats(const Tensor& x) {
  const NormProblem p("batch_norm_act_stats", x, 0);
  ChannelOutput out({2, p.channels()}, p.state);
  p.run(cpu::NormSums::stats, 2, cpu::NormResult::none, [&](int64_t c, const double* sums, double*) {
    out.set(0, c, sums[0]);
    out.set(1, c, sums[1]);
  });
  return out.tensor;
}

std::tuple<Tensor, Tensor> fwd_apply(const Tensor& x, FB_SITE, bool want_mask) {
  NormSite p(FB_SITE_OF("batch_norm_act_fwd_apply", x));
  Tensor y = p.fresh(), bits = bytes(want_mask ? p.mask_bytes() : 0);
  p.call.result = y.mutable_data_ptr();
  if (want_mask) p.call.mask_result = static_cast<uint8_t*>(bits.mutable_data_ptr());
  p.run(cpu::NormSums::none, 0, cpu::NormResult::forward,
        [&](int64_t c, const double*, double* operands) { p.set(c, operands); });
  return {y, bits};
}

// Runs a reduction alone.
Tensor sums_of(const NormSite& p, cpu::NormSums what, int64_t count) {
  ChannelOutput out({count, p.channels()}, p.state);
  p.run(what, count, cpu::NormResult::none, [&](int64_t c, const double* sums, double* operands) {
    p.set(c, operands);
    for (int64_t j = 0; sums && j < count; ++j) out.set(j, c, sums[j]);
  });
  return out.tensor;
}

// Runs the pass for results alone, with the coefficients (rows, C) in the dtype of the statistics.
void apply(const NormSite& p, cpu::NormResult what, const Tensor& k, int64_t rows) {
  const Input coefficients(k, p.op, "k", Shape{rows, p.channels()}, p.state);
  p.run(cpu::NormSums::none, 0, what, [&](int64_t c, const double*, double* operands) {
    p.set(c, operands);
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t i = j * p.channels() + c;
      operands[cpu::kFirstCoefficient + j] = p.state == ScalarType::Double ? static_cast<const double*>(coefficients.data())[i]
                                                                           : static_cast<const float*>(coefficients.data())[i];
    }
  });
}

Tensor bwd_reduce(const Tensor& dy, const Tensor& x, FB_SITE) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd_reduce", x));
  p.call.dy = p.full(dy, "dy");
  return sums_of(p, cpu::NormSums::backward, p.is_prelu() ? 3 : 2);
}

std::tuple<Tensor, Tensor> bwd_apply(const Tensor& dy, const Tensor& x, FB_SITE, const Tensor& k, bool want_dresidual) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd_apply", x));
  p.call.dy = p.full(dy, "dy");
  Tensor dx = p.fresh(), dresidual = p.fresh(want_dresidual);
  p.call.result = dx.mutable_data_ptr();
  if (want_dresidual) p.call.result2 = dresidual.mutable_data_ptr();
  apply(p, cpu::NormResult::backward, k, 3);
  return {dx, dresidual};
}

Tensor bwd_bwd_reduce(const MaybeTensor& v, const MaybeTensor& v_residual, const Tensor& dy, const Tensor& x, FB_SITE) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd_bwd_reduce", x));
  p.call.dy = p.full(dy, "dy");
  p.call.v = p.full(v, "v");
  p.call.v_r = p.full(v_residual, "v_residual");
  return sums_of(p, cpu::NormSums::second_order, p.is_curved() ? 12 : 5);
}

std::tuple<Tensor, Tensor, Tensor> bwd_bwd_apply(const MaybeTensor& v, const MaybeTensor& v_residual, const Tensor& dy,
                                                 const Tensor& x, FB_SITE, const Tensor& k) {
  NormSite p(FB_SITE_OF("batch_norm_act_bwd_bwd_apply", x));
  p.call.dy = p.full(dy, "dy");
  p.call.v = p.full(v, "v");
  p.call.v_r = p.full(v_residual, "v_residual");
  const bool want_residual = p.is_curved() && residual;
  Tensor a_x = p.fresh(), a_dy = p.fresh(), a_residual = p.fresh(want_residual);
  p.call.result = a_x.mutable_data_ptr();
  p.call.result2 = a_dy.mutable_data_ptr();
  if (want_residual) p.call.result3 = a_residual.mutable_data_ptr();
  apply(p, cpu::NormResult::second_order, k, cpu::kNormCoefficients);
  return {a_x, a_dy, a_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&batch_norm_act_bwd));
  m.impl("batch_norm_act_bwd_bwd", TORCH_BOX(&batch_norm_act_bwd_bwd));
  m.impl("batch_norm_act_stats", TORCH_BOX(&stats));
  m.impl("batch_norm_act_fwd_apply", TORCH_BOX(&fwd_apply));
  m.impl("batch_norm_act_bwd_reduce", TORCH_BOX(&bwd_reduce));
  m.impl("batch_norm_act_bwd_apply", TORCH_BOX(&bwd_apply));
  m.impl("batch_norm_act_bwd_bwd_reduce", TORCH_BOX(&bwd_bwd_reduce));
  m.impl("batch_norm_act_bwd_bwd_apply", TORCH_BOX(&bwd_bwd_apply));
}

}  // namespace fuseblock::torch_cpu
