// CUDA operators of the recurrence with resident weights, a pair for each tier, and of whole small layers: out-variants, called
// by python/fuseblock/launch/resident_recurrence.py and cuda_lstm_layer.py.
#if defined(WITH_CUDA)

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "cuda/lstm_recurrence_block.h"
#include "cuda/lstm_recurrence_cluster.h"
#include "cuda/lstm_recurrence_grid.h"
#include "torch/cuda_tensors.h"

namespace fuseblock::torch_cuda {
namespace {

using Sizes = std::initializer_list<int64_t>;

using Resident = int (*)(int64_t hidden, int dtype);

// What the tier says of the current device. The driver is asked once.
template <Resident kResident>
int resident_blocks(int32_t device, int64_t hidden, int dtype) {
  static std::mutex mutex;
  static std::map<std::tuple<int32_t, int64_t, int>, int> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, missing] = answers.try_emplace({device, hidden, dtype});
  if (missing) found->second = kResident(hidden, dtype);
  return found->second;
}

// One call: the sizes that its tensors must have, and the launch on the device of its gates.
class Call {
 public:
  Call(const char* op, const Tensor& gates, const Tensor& c0, const MaybeTensor& lengths, int64_t passes)
      : op_(op), device_(gates), dtype_(gates.scalar_type()), index_(gates.get_device_index()) {
    STD_TORCH_CHECK(gates.dim() == 3 && c0.dim() == 3, "fuseblock::", op, ": expected gates and c0 of 3 dimensions");
    shape.steps = gates.size(0);
    shape.batch = c0.size(1);
    shape.hidden = c0.size(2);
    shape.directions = c0.size(0);
    shape.passes = static_cast<int>(passes);
    number_ = dtype_number(gates, op);
    if (lengths.has_value()) {
      check(*lengths, "lengths", ScalarType::Long, {shape.batch});
      shape.lengths = static_cast<const int64_t*>(lengths->data_ptr());
    }
    int shared_bytes = 0;
    check_launch(cudaDeviceGetAttribute(&shape.multiprocessors, cudaDevAttrMultiProcessorCount, index_), op);
    check_launch(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), op);
    shape.shared_bytes = shared_bytes;
  }

  // T (steps, batch, columns), any strides of the first two dimensions.
  Sequence strided(const MaybeTensor& x, const char* name, int64_t columns) const {
    if (!x.has_value()) return {nullptr, 0, 0};
    check(*x, name, dtype_, {shape.steps, shape.batch, columns}, false);
    STD_TORCH_CHECK(x->size(2) <= 1 || x->stride(2) == 1, "fuseblock::", op_, ": ", name, " needs contiguous columns");
    return {x->data_ptr(), x->stride(0), x->stride(1)};
  }
  // Columns of units, or of their gates.
  int64_t columns(int64_t gates) const { return shape.directions * gates * shape.hidden; }
  // (steps, batch, columns), contiguous.
  void* gates(const MaybeTensor& x, const char* name) const { return sequence(x, name, dtype_, 4); }
  void* cells(const MaybeTensor& x, const char* name) const { return sequence(x, name, dtype_, 1); }
  float* states(const MaybeTensor& x, const char* name) const {
    return static_cast<float*>(sequence(x, name, ScalarType::Float, 1));
  }
  // (directions, batch, hidden): of T, of float32.
  void* hidden(const MaybeTensor& x, const char* name) const { return state(x, name, dtype_); }
  float* cell(const MaybeTensor& x, const char* name) const {
    return static_cast<float*>(state(x, name, ScalarType::Float));
  }
  void* weights(const Tensor& x) const {
    check(x, "w_hh", dtype_, {shape.directions, 4 * shape.hidden, (shape.hidden + 7) / 8 * 8});
    return x.data_ptr();
  }

  // Of one direction.
  const void* weight(const Tensor& x, const char* name, Sizes sizes) const {
    check(x, name, dtype_, sizes);
    return x.data_ptr();
  }

  // Bytes at a multiple of 16.
  void* workspace(const MaybeTensor& x) const {
    if (!x.has_value()) return nullptr;
    check(*x, "workspace", ScalarType::Byte, {x->dim() == 1 ? x->size(0) : 0});
    return x->data_ptr();
  }

  // Of a tier that says how many of its blocks run at the same time, fewer multiprocessors may be of use.
  template <Resident kResident>
  void limit() {
    if constexpr (kResident != nullptr) {
      shape.multiprocessors = std::min(shape.multiprocessors, resident_blocks<kResident>(index_, shape.hidden, number_));
    }
  }

  template <class Op>
  void launch(int (*launcher)(const Op*, int, void*), const Op& op) const {
    check_launch(launcher(&op, number_, device_.stream()), op_);
  }

  LstmShape shape{};

 private:
  void check(const Tensor& x, const char* name, ScalarType dtype, Sizes sizes, bool contiguous = true) const {
    bool fits = x.is_cuda() && x.get_device_index() == index_ && x.scalar_type() == dtype &&
                x.dim() == static_cast<int64_t>(sizes.size()) && (!contiguous || x.is_contiguous());
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = x.size(d) == sizes.begin()[d];
    STD_TORCH_CHECK(fits, "fuseblock::", op_, ": ", name, " has the wrong device, dtype, sizes or strides");
  }
  void* sequence(const MaybeTensor& x, const char* name, ScalarType dtype, int64_t gates) const {
    if (!x.has_value()) return nullptr;
    check(*x, name, dtype, {shape.steps, shape.batch, columns(gates)});
    return x->data_ptr();
  }
  void* state(const MaybeTensor& x, const char* name, ScalarType dtype) const {
    if (!x.has_value()) return nullptr;
    check(*x, name, dtype, {shape.directions, shape.batch, shape.hidden});
    return x->data_ptr();
  }

  const char* op_;
  OnDeviceOf device_;
  ScalarType dtype_;
  int32_t index_;
  DType number_;
};

template <int (*kLauncher)(const LstmFwd*, int, void*), Resident kResident>
void fwd(const Tensor& gx, const Tensor& h0, const Tensor& c0, const Tensor& w_hh, const MaybeTensor& lengths, const Tensor& y,
         const Tensor& h_n, const Tensor& c_n, const MaybeTensor& gates, const MaybeTensor& c, const MaybeTensor& workspace,
         int64_t passes) {
  Call call("lstm_recurrence", gx, c0, lengths, passes);
  call.limit<kResident>();
  STD_TORCH_CHECK(gates.has_value() == c.has_value(), "fuseblock::lstm_recurrence: expected both of gates and c, or neither");
  const LstmFwd op{.shape = call.shape,
                   .gx = call.strided(gx, "gx", call.columns(4)),
                   .h0 = call.hidden(h0, "h0"),
                   .w_hh = call.weights(w_hh),
                   .c0 = call.cell(c0, "c0"),
                   .y = call.cells(y, "y"),
                   .h_n = call.hidden(h_n, "h_n"),
                   .c_n = call.cell(c_n, "c_n"),
                   .gates = call.gates(gates, "gates"),
                   .c = call.states(c, "c"),
                   .workspace = call.workspace(workspace),
                   .workspace_bytes = workspace.has_value() ? workspace->size(0) : 0};
  call.launch(kLauncher, op);
}

// w_ih: of each direction. biases: b_ih and b_hh of each direction, or none.
void block_layer_fwd(const Tensor& x, std::vector<Tensor> w_ih, std::vector<Tensor> biases, const Tensor& h0, const Tensor& c0,
                     const Tensor& w_hh, const MaybeTensor& lengths, const Tensor& y, const Tensor& h_n, const Tensor& c_n,
                     const MaybeTensor& gates, const MaybeTensor& c) {
  const Call call("lstm_layer", x, c0, lengths, 1);
  const int64_t input = x.size(2);
  const size_t directions = static_cast<size_t>(call.shape.directions);
  STD_TORCH_CHECK(gates.has_value() == c.has_value(), "fuseblock::lstm_layer: expected both of gates and c, or neither");
  STD_TORCH_CHECK(directions <= 2 && w_ih.size() == directions && (biases.empty() || biases.size() == 2 * directions),
                  "fuseblock::lstm_layer: expected one w_ih for each direction, and two biases or none");
  LstmLayerFwd op{{.shape = call.shape,
                   .gx = {},
                   .h0 = call.hidden(h0, "h0"),
                   .w_hh = call.weights(w_hh),
                   .c0 = call.cell(c0, "c0"),
                   .y = call.cells(y, "y"),
                   .h_n = call.hidden(h_n, "h_n"),
                   .c_n = call.cell(c_n, "c_n"),
                   .gates = call.gates(gates, "gates"),
                   .c = call.states(c, "c"),
                   .workspace = nullptr,
                   .workspace_bytes = 0},
                  call.strided(x, "x", input),
                  input,
                  {},
                  {},
                  {}};
  const int64_t rows = 4 * call.shape.hidden;
  for (size_t d = 0; d < directions; ++d) {
    op.w_ih[d] = call.weight(w_ih[d], "w_ih", {rows, input});
    if (biases.empty()) continue;
    op.b_ih[d] = call.weight(biases[2 * d], "b_ih", {rows});
    op.b_hh[d] = call.weight(biases[2 * d + 1], "b_hh", {rows});
  }
  call.launch(launch_lstm_block_layer_fwd, op);
}

template <int (*kLauncher)(const LstmBwd*, int, void*), Resident kResident>
void bwd(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& d_gates,
         const MaybeTensor& d_c, const Tensor& gates, const Tensor& c, const Tensor& c0, const Tensor& w_hh,
         const MaybeTensor& lengths, const Tensor& dgx, const Tensor& dh0, const Tensor& dc0, const MaybeTensor& workspace,
         int64_t passes) {
  Call call("lstm_recurrence_bwd", gates, c0, lengths, passes);
  call.limit<kResident>();
  const LstmBwd op{.shape = call.shape,
                   .dy = call.strided(dy, "dy", call.columns(1)),
                   .dh_n = call.hidden(dh_n, "dh_n"),
                   .dc_n = call.cell(dc_n, "dc_n"),
                   .d_gates = call.gates(d_gates, "d_gates"),
                   .d_c = call.states(d_c, "d_c"),
                   .gates = call.gates(gates, "gates"),
                   .c = call.states(c, "c"),
                   .c0 = call.cell(c0, "c0"),
                   .w_hh = call.weights(w_hh),
                   .dgx = call.gates(dgx, "dgx"),
                   .dh0 = call.hidden(dh0, "dh0"),
                   .dc0 = call.cell(dc0, "dc0"),
                   .workspace = call.workspace(workspace),
                   .workspace_bytes = workspace.has_value() ? workspace->size(0) : 0};
  call.launch(kLauncher, op);
}

template <Resident kForward, Resident kBackward>
int64_t resident(const Tensor& w_hh, bool backward) {
  const OnDeviceOf device(w_hh);
  const auto ask = backward ? &resident_blocks<kBackward> : &resident_blocks<kForward>;
  return ask(w_hh.get_device_index(), w_hh.size(2), dtype_number(w_hh, "lstm_recurrence"));
}

// One pair of operators for every tier; where multiprocessors may be there that none of its blocks runs on, who says so.
#define FB_LSTM_TIERS(X) \
  X(block, nullptr, nullptr) X(cluster, lstm_cluster_fwd_resident, lstm_cluster_bwd_resident) X(grid, nullptr, nullptr)
// Those that a device with the right limits may still refuse say how many of their blocks run at the same time.
#define FB_LSTM_REFUSABLE_TIERS(X) X(cluster) X(grid)

STABLE_TORCH_LIBRARY_FRAGMENT(fuseblock_cuda, m) {
#define FB_DEFINE(tier, ...)                                                                                         \
  m.def("lstm_" #tier                                                                                                \
        "_fwd(Tensor gx, Tensor h0, Tensor c0, Tensor w_hh, Tensor? lengths, Tensor(a!) y, Tensor(b!) h_n,"          \
        " Tensor(c!) c_n, Tensor(d!)? gates, Tensor(e!)? c, Tensor(f!)? workspace, int passes) -> ()");              \
  m.def("lstm_" #tier                                                                                                \
        "_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? d_gates, Tensor? d_c, Tensor gates, Tensor c,"         \
        " Tensor c0, Tensor w_hh, Tensor? lengths, Tensor(a!) dgx, Tensor(b!) dh0, Tensor(c!) dc0,"                  \
        " Tensor(d!)? workspace, int passes) -> ()");
  FB_LSTM_TIERS(FB_DEFINE)
#undef FB_DEFINE
  m.def(
      "lstm_block_layer_fwd(Tensor x, Tensor[] w_ih, Tensor[] biases, Tensor h0, Tensor c0, Tensor w_hh, Tensor? lengths,"
      " Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!)? gates, Tensor(e!)? c) -> ()");
#define FB_DEFINE(tier) m.def("lstm_" #tier "_resident(Tensor w_hh, bool backward) -> int");
  FB_LSTM_REFUSABLE_TIERS(FB_DEFINE)
#undef FB_DEFINE
}

STABLE_TORCH_LIBRARY_IMPL(fuseblock_cuda, CUDA, m) {
#define FB_IMPLEMENT(tier, fwd_resident, bwd_resident)                                    \
  m.impl("lstm_" #tier "_fwd", TORCH_BOX((&fwd<launch_lstm_##tier##_fwd, fwd_resident>))); \
  m.impl("lstm_" #tier "_bwd", TORCH_BOX((&bwd<launch_lstm_##tier##_bwd, bwd_resident>)));
  FB_LSTM_TIERS(FB_IMPLEMENT)
#undef FB_IMPLEMENT
  m.impl("lstm_block_layer_fwd", TORCH_BOX(&block_layer_fwd));
#define FB_IMPLEMENT(tier) \
  m.impl("lstm_" #tier "_resident", TORCH_BOX((&resident<lstm_##tier##_fwd_resident, lstm_##tier##_bwd_resident>)));
  FB_LSTM_REFUSABLE_TIERS(FB_IMPLEMENT)
#undef FB_IMPLEMENT
}

}  // namespace
}  // namespace fuseblock::torch_cuda

#endif
