// The Python module fuseblock._C and the schemas of its CPU operators; importing the module registers everything.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// What describes one normalisation to the kernels of batch_norm_act (`Site` in launch/batch_norm_act.py), without x.
#define NORM_SITE                                                                                              \
  " Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? slope," \
  " int activation, float negative_slope"

STABLE_TORCH_LIBRARY(fuseblock_cpu, m) {
  m.def("lstm_gates(Tensor gates, Tensor c) -> (Tensor h, Tensor c_new)");
  m.def("lstm_gates_bwd(Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c) -> (Tensor dgates, Tensor dc)");
  m.def(
      "lstm_gates_bwd_bwd(Tensor? v_dgates, Tensor? v_dc, Tensor? dh, Tensor? dc_new, Tensor gates, Tensor c)"
      " -> (Tensor a_dh, Tensor a_dc_new, Tensor a_gates, Tensor a_c)");
  m.def(
      "lstm_recurrence(Tensor gx, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? lengths,"
      " Tensor? batch_sizes, bool save_state) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)");
  m.def(
      "lstm_recurrence_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? d_gates, Tensor? d_c, Tensor gates,"
      " Tensor c, Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? lengths, Tensor? batch_sizes)"
      " -> (Tensor dgx, Tensor dh0, Tensor dc0, Tensor dh)");
  m.def(
      "lstm_recurrence_bwd_(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor(a!) gates, Tensor c, Tensor c0, Tensor w_hh,"
      " Tensor? w_hr, Tensor? lengths, Tensor? batch_sizes) -> (Tensor dh0, Tensor dc0, Tensor dh)");
  m.def(
      "lstm_recurrence_bwd_bwd(Tensor? v_dgx, Tensor? v_dh0, Tensor? v_dc0, Tensor? v_dh, Tensor? dy, Tensor? dh_n,"
      " Tensor? dc_n, Tensor? d_gates, Tensor? d_c, Tensor gates, Tensor c, Tensor c0, Tensor w_hh, Tensor? w_hr,"
      " Tensor? lengths, Tensor? batch_sizes, Tensor dgx)"
      " -> (Tensor a_dy, Tensor a_dh_n, Tensor a_dc_n, Tensor a_d_gates, Tensor a_d_c, Tensor a_gates, Tensor a_c,"
      " Tensor a_c0, Tensor m_bar)");
  m.def(
      "lstm_layer(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, bool save_state)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)");
  m.def(
      "lstm_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, Tensor y, Tensor gates,"
      " Tensor c, Tensor[] weights, Tensor? batch_sizes, bool need_dx) -> Tensor[]");
  m.def("lstm_layer_fits(int input, int hidden) -> bool");
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor? mean, Tensor? var,"
      " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int activation,"
      " float negative_slope, bool training, bool want_mask, bool per_sample=False)"
      " -> (Tensor y, Tensor mean, Tensor var, Tensor invstd, Tensor count, Tensor mask)");
  m.def(
      "batch_norm_act_bwd(Tensor dy, Tensor x," NORM_SITE ", bool training, bool want_dx,"
      " bool want_sums, bool want_dresidual, bool per_sample=False)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dslope, Tensor dresidual)");
  m.def(
      "batch_norm_act_bwd_bwd(Tensor? v_dx, Tensor? v_dweight, Tensor? v_dbias, Tensor? v_dslope, Tensor? v_dresidual,"
      " Tensor dy, Tensor x," NORM_SITE ", bool training, bool per_sample=False)"
      " -> (Tensor a_dy, Tensor a_x, Tensor a_weight, Tensor a_bias, Tensor a_residual, Tensor a_slope)");
  m.def("batch_norm_act_stats(Tensor x) -> Tensor");
  m.def("batch_norm_act_fwd_apply(Tensor x," NORM_SITE ", bool want_mask) -> (Tensor y, Tensor mask)");
  m.def("batch_norm_act_bwd_reduce(Tensor dy, Tensor x," NORM_SITE ") -> Tensor");
  m.def(
      "batch_norm_act_bwd_apply(Tensor dy, Tensor x," NORM_SITE ", Tensor k,"
      " bool want_dresidual) -> (Tensor dx, Tensor dresidual)");
  m.def("batch_norm_act_bwd_bwd_reduce(Tensor? v, Tensor? v_residual, Tensor dy, Tensor x," NORM_SITE ") -> Tensor");
  m.def(
      "batch_norm_act_bwd_bwd_apply(Tensor? v, Tensor? v_residual, Tensor dy, Tensor x," NORM_SITE ", Tensor k)"
      " -> (Tensor a_x, Tensor a_dy, Tensor a_residual)");
  m.def(
      "upfirdn2d(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int pad_x0, int pad_x1, int pad_y0,"
      " int pad_y1, bool flip_filter, float gain) -> Tensor");
  m.def(
      "bias_act(Tensor x, Tensor? bias, Tensor? slope, int activation, float negative_slope, float gain, float clamp,"
      " bool save) -> (Tensor y, Tensor mask)");
  m.def(
      "conv2d_columns(Tensor dy, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int tile_bytes)"
      " -> (Tensor y, Tensor dweight)");
  m.def("leaky_relu_(Tensor(a!) x, float negative_slope) -> Tensor mask");
  m.def(
      "bias_act_bwd(Tensor dy, Tensor? x, Tensor? bias, Tensor? slope, Tensor? mask, int activation,"
      " float negative_slope, float gain, float clamp, bool need_dbias) -> (Tensor dx, Tensor dbias, Tensor dslope)");
  m.def(
      "bias_act_bwd_bwd(Tensor v, Tensor? v_bias, Tensor? v_slope, Tensor? dy, Tensor? x, Tensor? bias, Tensor? slope,"
      " Tensor? mask, int activation, float negative_slope, float gain, float clamp)"
      " -> (Tensor a_dy, Tensor a_x, Tensor a_bias, Tensor a_slope)");
  m.def(
      "spectral_norm(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, int[] dims, int n_power_iterations, float eps)"
      " -> (Tensor[] ys, Tensor state)");
  m.def("spectral_norm_bwd(Tensor?[] dys, Tensor[] weights, Tensor state, int[] dims) -> Tensor[]");
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                        nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
