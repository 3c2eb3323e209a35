// torch.ops.fuseblock_cpu.lstm_layer, its gradient and lstm_layer_fits: checks, outputs, launch. Semantics:
// csrc/cpu/lstm_layer.h. weights: per direction w_ih (4H, I), w_hh (4H, H) and, if there are biases, b_ih, b_hh (4H,).
#include <tuple>

#include "../cpu/lstm_layer.h"
#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

using cpu::Series;

class LayerProblem {
 public:
  const char* op;
  cpu::Layer layer = {};
  ScalarType dtype, state;
  bool biased;

  LayerProblem(const char* op, const Tensor& x, const Tensor& h0, const Tensor& c0, const std::vector<Tensor>& weights,
               const MaybeTensor& batch_sizes)
      : op(op), packed_(batch_sizes.has_value()) {
    check_isa(op);
    cpu::Layout& l = layer.layout;
    l.dtype = kernel_dtype(x, op, "x");
    dtype = x.scalar_type();
    state = state_type(dtype);
    STD_TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2) && h0.size(2) >= 1, op,
                    ": h0 must have shape (D, B, H) with 1 or 2 directions and H >= 1, got ", text(shape_of(h0)));
    l.D = h0.size(0), l.B = h0.size(1), l.H = l.P = h0.size(2);
    STD_TORCH_CHECK(x.dim() == (packed_ ? 2 : 3), op, ": x must have shape ", packed_ ? "(N, I)" : "(T, B, I)", ", got ",
                    text(shape_of(x)));
    layer.I = x.size(packed_ ? 1 : 2);
    l.T = x.size(0);
    if (packed_) read_batch_sizes(*batch_sizes);
    STD_TORCH_CHECK(l.T >= 1 && l.B >= 1 && layer.I >= 1, op, ": x must not be empty, got shape ", text(shape_of(x)));
    layer.x = series(x, "x", layer.I, dtype, 1);
    h0_.emplace(h0, op, "h0", state_shape(), dtype);
    c0_.emplace(c0, op, "c0", state_shape(), state);

    const int64_t each = (int64_t)weights.size() / l.D;
    STD_TORCH_CHECK((each == 2 || each == 4) && each * l.D == (int64_t)weights.size(), op,
                    ": weights must hold 2 or 4 tensors per direction, got ", weights.size());
    biased = each == 4;
    weights_.reserve(weights.size());
    for (int64_t d = 0; d < l.D; ++d) {
      const Shape shapes[4] = {{4 * l.H, layer.I}, {4 * l.H, l.H}, {4 * l.H}, {4 * l.H}};
      const char* names[4] = {"w_ih", "w_hh", "b_ih", "b_hh"};
      const void* data[4] = {};
      for (int64_t k = 0; k < each; ++k)
        data[k] = weights_.emplace_back(weights[d * each + k], op, names[k], shapes[k], dtype).data();
      layer.weights[d] = {data[0], data[1], data[2], data[3]};
    }
  }

  LayerProblem(const LayerProblem&) = delete;  // the layout points into this object

  const void* h0() const { return h0_->data(); }
  const void* c0() const { return c0_->data(); }
  Shape time_shape(int64_t width) const {
    return packed_ ? Shape{rows_, width} : Shape{layer.layout.T, layer.layout.B, width};
  }
  Shape state_shape() const { return {layer.layout.D, layer.layout.B, layer.layout.H}; }
  Tensor time_output(int64_t width, ScalarType t) const { return empty(time_shape(layer.layout.D * width), t); }
  Tensor state_output(ScalarType t) const { return empty(state_shape(), t); }

  // A checked view of `width` values per direction; kept alive by this object.
  Series series(const Tensor& x, const char* name, int64_t width, ScalarType t, int64_t directions = 0) {
    check(x, op, name, time_shape((directions ? directions : layer.layout.D) * width), t);
    const int last = packed_ ? 1 : 2;
    kept_.push_back(x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x));
    return view(kept_.back());
  }
  Series view(const Tensor& x) const {
    if (x.dim() == 1) return {};  // an output that was not asked for
    return {const_cast<void*>(x.const_data_ptr()), packed_ ? 0 : x.stride(0), x.stride(packed_ ? 0 : 1)};
  }

 private:
  bool packed_;
  int64_t rows_ = 0;
  std::vector<int64_t> active_, start_;
  std::optional<Input> h0_, c0_;
  std::vector<Input> weights_;
  std::vector<Tensor> kept_;

  void read_batch_sizes(const Tensor& batch_sizes) {
    cpu::Layout& l = layer.layout;
    l.T = batch_sizes.dim() == 1 ? batch_sizes.size(0) : 0;
    const Input sizes(batch_sizes, op, "batch_sizes", Shape{l.T}, ScalarType::Long);
    STD_TORCH_CHECK(l.T >= 1, op, ": batch_sizes must have at least one step");
    const int64_t* n = static_cast<const int64_t*>(sizes.data());
    STD_TORCH_CHECK(n[0] == l.B, op, ": batch_sizes[0] must be the batch size ", l.B, ", got ", n[0]);
    active_.assign(n, n + l.T);
    start_.resize(l.T);
    for (int64_t t = 0; t < l.T; ++t) {
      STD_TORCH_CHECK(n[t] >= 1 && (t == 0 || n[t] <= n[t - 1]), op,
                      ": batch_sizes must be positive and not increase, got ", n[t], " at step ", t);
      start_[t] = rows_;
      rows_ += n[t];
    }
    l.active = active_.data();
    l.start = start_.data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer(const Tensor& x, const Tensor& h0, const Tensor& c0,
                                                              std::vector<Tensor> weights,
                                                              const MaybeTensor& batch_sizes, bool save_state) {
  LayerProblem p("lstm_layer", x, h0, c0, weights, batch_sizes);
  const int64_t H = p.layer.layout.H;
  Tensor y = p.time_output(H, p.dtype), h_n = p.state_output(p.dtype), c_n = p.state_output(p.state);
  Tensor gates = save_state ? p.time_output(4 * H, p.dtype) : empty({0}, p.dtype);
  Tensor c = save_state ? p.time_output(H, p.state) : empty({0}, p.state);
  cpu::lstm_layer({p.layer, p.h0(), p.c0(), p.view(y), p.view(gates), p.view(c), h_n.mutable_data_ptr(),
                   c_n.mutable_data_ptr()},
                  torch_threads());
  return {y, h_n, c_n, gates, c};
}

// dx (empty unless asked for), dh0, dc0, then per direction dw_ih, dw_hh and db, the gradient of either bias (empty
// without biases).
std::vector<Tensor> lstm_layer_bwd(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                   const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& y,
                                   const Tensor& gates, const Tensor& c, std::vector<Tensor> weights,
                                   const MaybeTensor& batch_sizes, bool need_dx) {
  LayerProblem p("lstm_layer_bwd", x, h0, c0, weights, batch_sizes);
  const int64_t H = p.layer.layout.H, I = p.layer.I;
  const Input dh_n_in(dh_n, p.op, "dh_n", p.state_shape(), p.dtype), dc_n_in(dc_n, p.op, "dc_n", p.state_shape(), p.state);
  std::vector<Tensor> out = {need_dx ? empty(p.time_shape(I), p.dtype) : empty({0}, p.dtype), p.state_output(p.dtype),
                             p.state_output(p.state)};
  cpu::LayerBwd args = {};
  args.layer = p.layer;
  if (dy) args.dy = p.series(*dy, "dy", H, p.dtype);
  args.dh_n = dh_n_in.data(), args.dc_n = dc_n_in.data();
  args.y = p.series(y, "y", H, p.dtype);
  args.gates = p.series(gates, "gates", 4 * H, p.dtype);
  args.c = p.series(c, "c", H, p.state);
  args.h0 = p.h0(), args.c0 = p.c0();
  if (need_dx) args.dx = out[0].mutable_data_ptr();
  args.dh0 = out[1].mutable_data_ptr(), args.dc0 = out[2].mutable_data_ptr();
  for (int64_t d = 0; d < p.layer.layout.D; ++d) {
    out.push_back(empty({4 * H, I}, p.dtype));
    args.dw_ih[d] = out.back().mutable_data_ptr();
    out.push_back(empty({4 * H, H}, p.dtype));
    args.dw_hh[d] = out.back().mutable_data_ptr();
    out.push_back(empty({p.biased ? 4 * H : 0}, p.dtype));
    if (p.biased) args.db[d] = out.back().mutable_data_ptr();
  }
  cpu::lstm_layer_bwd(args, torch_threads());
  return out;
}

bool lstm_layer_fits(int64_t input, int64_t hidden) { return cpu::lstm_layer_fits(input, hidden); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("lstm_layer", TORCH_BOX(&lstm_layer));
  m.impl("lstm_layer_bwd", TORCH_BOX(&lstm_layer_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CompositeExplicitAutograd, m) {
  m.impl("lstm_layer_fits", TORCH_BOX(&lstm_layer_fits));
}

}  // namespace fuseblock::torch_cpu
