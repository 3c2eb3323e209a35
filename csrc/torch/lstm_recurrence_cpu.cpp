// torch.ops.fuseblock_cpu.lstm_recurrence and its derivatives: checks, outputs, launch. Semantics:
// csrc/cpu/lstm_recurrence.h.
#include <algorithm>
#include <tuple>

#include "cpu_tensors.h"

namespace fuseblock::torch_cpu {

namespace {

using cpu::Series;

// Sizes, the order of rows and the time-shaped inputs of one call.
class Problem {
 public:
  const char* op;
  cpu::Layout layout;
  ScalarType dtype, state;
  std::optional<Input> w_hh, w_hr;

  // `wide` is a (T, B, D * 4H) tensor, or (N, D * 4H) if batch_sizes is given; c0 (D, B, H) tells D, B and H.
  Problem(const char* op, const char* wide_name, const Tensor& wide, const Tensor& c0, const Tensor& hh,
          const MaybeTensor& hr, const MaybeTensor& lengths, const MaybeTensor& batch_sizes)
      : op(op) {
    check_isa(op);
    layout = {};
    layout.dtype = kernel_dtype(wide, op, wide_name);
    dtype = wide.scalar_type();
    state = state_type(dtype);
    STD_TORCH_CHECK(c0.dim() == 3, op, ": c0 must have shape (D, B, H), got ", text(shape_of(c0)));
    layout.D = c0.size(0), layout.B = c0.size(1), layout.H = c0.size(2);
    STD_TORCH_CHECK((layout.D == 1 || layout.D == 2) && layout.H >= 1, op,
                    ": c0 must have shape (D, B, H) with 1 or 2 directions and H >= 1, got ", text(shape_of(c0)));
    layout.P = hr ? (hr->dim() == 3 ? hr->size(1) : 0) : layout.H;
    w_hh.emplace(hh, op, "w_hh", Shape{layout.D, 4 * layout.H, layout.P}, dtype);
    w_hr.emplace(hr, op, "w_hr", Shape{layout.D, layout.P, layout.H}, dtype);
    STD_TORCH_CHECK(!(lengths && batch_sizes), op, ": lengths and batch_sizes exclude each other");
    if (batch_sizes) read_batch_sizes(*batch_sizes);
    else read_sizes(wide, wide_name);
    check(wide, op, wide_name, time_shape(4 * layout.H), dtype);
    check(c0, op, "c0", state_shape(layout.H), state);
    if (lengths) read_lengths(*lengths);
  }

  Problem(const Problem&) = delete;  // the layout points into this object

  bool projected() const { return bool(*w_hr); }
  cpu::Weights weights() const { return {w_hh->data(), w_hr->data()}; }
  Shape time_shape(int64_t width) const {
    return packed_ ? Shape{rows_, layout.D * width} : Shape{layout.T, layout.B, layout.D * width};
  }
  Shape state_shape(int64_t width) const { return {layout.D, layout.B, width}; }
  Tensor time_output(int64_t width, ScalarType t) const { return empty(time_shape(width), t); }
  Tensor state_output(int64_t width, ScalarType t) const { return empty(state_shape(width), t); }

  // A checked view; kept alive by this object. Any strides but the last dimension's are used as they are.
  Series series(const Tensor& x, const char* name, int64_t width, ScalarType t) {
    check(x, op, name, time_shape(width), t);
    const int last = packed_ ? 1 : 2;
    kept_.push_back(x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x));
    return view(kept_.back());
  }
  Series series(const MaybeTensor& x, const char* name, int64_t width, ScalarType t) {
    return x ? series(*x, name, width, t) : Series{};
  }
  Series view(const Tensor& x) const {
    if (x.dim() == 1) return {};  // an output that was not asked for
    return {const_cast<void*>(x.const_data_ptr()), packed_ ? 0 : x.stride(0), x.stride(packed_ ? 0 : 1)};
  }

 private:
  bool packed_ = false;
  int64_t rows_ = 0;
  std::vector<int64_t> order_, active_, start_;
  std::vector<Tensor> kept_;

  void read_sizes(const Tensor& wide, const char* name) {
    STD_TORCH_CHECK(wide.dim() == 3, op, ": ", name, " must have shape (T, B, D*4H), got ", text(shape_of(wide)));
    layout.T = wide.size(0);
    STD_TORCH_CHECK(layout.T >= 1, op, ": ", name, " must have at least one time step, got shape ",
                    text(shape_of(wide)));
  }

  void read_batch_sizes(const Tensor& batch_sizes) {
    packed_ = true;
    layout.T = batch_sizes.dim() == 1 ? batch_sizes.size(0) : 0;
    const Input sizes(batch_sizes, op, "batch_sizes", Shape{layout.T}, ScalarType::Long);
    STD_TORCH_CHECK(layout.T >= 1, op, ": batch_sizes must have at least one step");
    const int64_t* n = static_cast<const int64_t*>(sizes.data());
    STD_TORCH_CHECK(n[0] == layout.B, op, ": batch_sizes[0] must be the batch size ", layout.B, ", got ", n[0]);
    active_.assign(n, n + layout.T);
    start_.resize(layout.T);
    for (int64_t t = 0; t < layout.T; ++t) {
      STD_TORCH_CHECK(n[t] >= 1 && (t == 0 || n[t] <= n[t - 1]), op,
                      ": batch_sizes must be positive and not increase, got ", n[t], " at step ", t);
      start_[t] = rows_;
      rows_ += n[t];
    }
    layout.active = active_.data();
    layout.start = start_.data();
  }

  // Rows in descending order of length: those active at a step come first, and a thread's rows stay together.
  void read_lengths(const Tensor& lengths) {
    const Input input(lengths, op, "lengths", Shape{layout.B}, ScalarType::Long);
    const int64_t* n = static_cast<const int64_t*>(input.data());
    bool full = true;
    for (int64_t b = 0; b < layout.B; ++b) {
      STD_TORCH_CHECK(n[b] >= 0 && n[b] <= layout.T, op, ": lengths must be between 0 and ", layout.T, ", got ", n[b],
                      " at row ", b);
      full = full && n[b] == layout.T;
    }
    if (full) return;
    order_.resize(layout.B);
    for (int64_t b = 0; b < layout.B; ++b) order_[b] = b;
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) { return n[x] > n[y]; });
    active_.resize(layout.T);
    for (int64_t t = 0, k = layout.B; t < layout.T; ++t) {
      while (k > 0 && n[order_[k - 1]] <= t) --k;
      active_[t] = k;
    }
    layout.order = order_.data();
    layout.active = active_.data();
  }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five lstm_recurrence(const Tensor& gx, const Tensor& h0, const Tensor& c0, const Tensor& w_hh, const MaybeTensor& w_hr,
                     const MaybeTensor& lengths, const MaybeTensor& batch_sizes, bool save_state) {
  Problem p("lstm_recurrence", "gx", gx, c0, w_hh, w_hr, lengths, batch_sizes);
  const int64_t H = p.layout.H, P = p.layout.P;
  const Input h_in(h0, p.op, "h0", p.state_shape(P), p.dtype), c_in(c0, p.op, "c0", p.state_shape(H), p.state);
  Tensor y = p.time_output(P, p.dtype), h_n = p.state_output(P, p.dtype), c_n = p.state_output(H, p.state);
  Tensor gates = save_state ? p.time_output(4 * H, p.dtype) : empty({0}, p.dtype);
  Tensor c = save_state ? p.time_output(H, p.state) : empty({0}, p.state);
  cpu::lstm_recurrence({p.layout, p.weights(), p.series(gx, "gx", 4 * H, p.dtype), h_in.data(), c_in.data(), p.view(y),
                        p.view(gates), p.view(c), h_n.mutable_data_ptr(), c_n.mutable_data_ptr()},
                       torch_threads());
  return {y, h_n, c_n, gates, c};
}

// The inputs that the first- and second-order ops share.
struct Gradients {
  Input dh_n, dc_n, c0;
  Series dy, d_gates, d_c, gates, c;

  Gradients(Problem& p, const MaybeTensor& dy_, const MaybeTensor& dh_n_, const MaybeTensor& dc_n_,
            const MaybeTensor& d_gates_, const MaybeTensor& d_c_, const Tensor& gates_, const Tensor& c_,
            const Tensor& c0_)
      : dh_n(dh_n_, p.op, "dh_n", p.state_shape(p.layout.P), p.dtype),
        dc_n(dc_n_, p.op, "dc_n", p.state_shape(p.layout.H), p.state),
        c0(c0_, p.op, "c0", p.state_shape(p.layout.H), p.state),
        dy(p.series(dy_, "dy", p.layout.P, p.dtype)),
        d_gates(p.series(d_gates_, "d_gates", 4 * p.layout.H, p.dtype)),
        d_c(p.series(d_c_, "d_c", p.layout.H, p.state)),
        gates(p.series(gates_, "gates", 4 * p.layout.H, p.dtype)),
        c(p.series(c_, "c", p.layout.H, p.state)) {}

  // Without outputs.
  cpu::RecurrenceBwd backward(const Problem& p) const {
    return {p.layout, p.weights(), dy,        dh_n.data(), dc_n.data(), d_gates, d_c, gates,
            c,        c0.data(),   Series{}, Series{},    nullptr,     nullptr, {},  {}};
  }
};

// (dh0, dc0, dh); dgx is written to `dgx`.
std::tuple<Tensor, Tensor, Tensor> backward_into(const Tensor& dgx, const Problem& p, const Gradients& in) {
  const int64_t H = p.layout.H, P = p.layout.P;
  Tensor dh0 = p.state_output(P, p.dtype), dc0 = p.state_output(H, p.state);
  Tensor dh = p.projected() ? p.time_output(P, p.dtype) : empty({0}, p.dtype);
  cpu::RecurrenceBwd args = in.backward(p);
  args.dgx = p.view(dgx);
  args.dh = p.view(dh);
  args.dh0 = dh0.mutable_data_ptr();
  args.dc_carry = dc0.mutable_data_ptr();
  cpu::lstm_recurrence_bwd(args, torch_threads());
  return {dh0, dc0, dh};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_recurrence_bwd(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& d_gates,
    const MaybeTensor& d_c, const Tensor& gates, const Tensor& c, const Tensor& c0, const Tensor& w_hh,
    const MaybeTensor& w_hr, const MaybeTensor& lengths, const MaybeTensor& batch_sizes) {
  Problem p("lstm_recurrence_bwd", "gates", gates, c0, w_hh, w_hr, lengths, batch_sizes);
  const Gradients in(p, dy, dh_n, dc_n, d_gates, d_c, gates, c, c0);
  Tensor dgx = p.time_output(4 * p.layout.H, p.dtype);
  auto [dh0, dc0, dh] = backward_into(dgx, p, in);
  return {dgx, dh0, dc0, dh};
}

// The same with dgx written over gates: a unit's gates are read before its gradients are written, and by no other unit.
std::tuple<Tensor, Tensor, Tensor> lstm_recurrence_bwd_(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const Tensor& gates, const Tensor& c,
    const Tensor& c0, const Tensor& w_hh, const MaybeTensor& w_hr, const MaybeTensor& lengths,
    const MaybeTensor& batch_sizes) {
  Problem p("lstm_recurrence_bwd_", "gates", gates, c0, w_hh, w_hr, lengths, batch_sizes);
  STD_TORCH_CHECK(gates.is_contiguous(), p.op, ": gates must be contiguous");
  const Gradients in(p, dy, dh_n, dc_n, std::nullopt, std::nullopt, gates, c, c0);
  return backward_into(gates, p, in);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence_bwd_bwd(
    const MaybeTensor& v_dgx, const MaybeTensor& v_dh0, const MaybeTensor& v_dc0, const MaybeTensor& v_dh,
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& d_gates,
    const MaybeTensor& d_c, const Tensor& gates, const Tensor& c, const Tensor& c0, const Tensor& w_hh,
    const MaybeTensor& w_hr, const MaybeTensor& lengths, const MaybeTensor& batch_sizes, const Tensor&) {
  Problem p("lstm_recurrence_bwd_bwd", "gates", gates, c0, w_hh, w_hr, lengths, batch_sizes);
  const int64_t H = p.layout.H, P = p.layout.P;
  const Gradients in(p, dy, dh_n, dc_n, d_gates, d_c, gates, c, c0);
  const Input v_h(v_dh0, p.op, "v_dh0", p.state_shape(P), p.dtype);
  const Input v_c(v_dc0, p.op, "v_dc0", p.state_shape(H), p.state);
  Tensor a_dy = p.time_output(P, p.dtype), a_dh_n = p.state_output(P, p.dtype), a_dc_n = p.state_output(H, p.state);
  Tensor a_d_gates = p.time_output(4 * H, p.dtype), a_d_c = p.time_output(H, p.state);
  Tensor a_gates = p.time_output(4 * H, p.dtype), a_c = p.time_output(H, p.state), a_c0 = p.state_output(H, p.state);
  Tensor m_bar = p.projected() ? p.time_output(H, p.dtype) : empty({0}, p.dtype);

  cpu::RecurrenceBwd first = in.backward(p);
  first.dc_carry = a_c0.mutable_data_ptr();
  first.dm = p.view(a_c);
  first.dc_total = p.view(a_d_c);
  const Series v_dh_view = p.projected() ? p.series(v_dh, "v_dh", P, p.dtype) : Series{};
  cpu::lstm_recurrence_bwd_bwd(
      {p.layout, p.weights(), p.series(v_dgx, "v_dgx", 4 * H, p.dtype), v_h.data(), v_c.data(), v_dh_view, in.d_gates,
       in.gates, in.c, in.c0.data(), p.view(a_dy), a_dh_n.mutable_data_ptr(), a_dc_n.mutable_data_ptr(),
       p.view(a_d_gates), p.view(a_d_c), p.view(a_gates), p.view(a_c), a_c0.mutable_data_ptr(), p.view(m_bar)},
      first, torch_threads());
  return {a_dy, a_dh_n, a_dc_n, a_d_gates, a_d_c, a_gates, a_c, a_c0, m_bar};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cpu, CPU, m) {
  m.impl("lstm_recurrence", TORCH_BOX(&lstm_recurrence));
  m.impl("lstm_recurrence_bwd", TORCH_BOX(&lstm_recurrence_bwd));
  m.impl("lstm_recurrence_bwd_", TORCH_BOX(&lstm_recurrence_bwd_));
  m.impl("lstm_recurrence_bwd_bwd", TORCH_BOX(&lstm_recurrence_bwd_bwd));
}

}  // namespace fuseblock::torch_cpu
