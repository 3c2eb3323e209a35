// The Python module fuseblock._C and the schemas of its CPU operators; importing the module registers everything.
#include <Python.h>
#include <torch/csrc/stable/library.h>

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
      "upfirdn2d(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int pad_x0, int pad_x1, int pad_y0,"
      " int pad_y1, bool flip_filter, float gain) -> Tensor");
  m.def(
      "bias_act(Tensor x, Tensor? bias, Tensor? slope, int activation, float negative_slope, float gain, float clamp,"
      " bool save) -> (Tensor y, Tensor mask)");
  m.def(
      "bias_act_bwd(Tensor dy, Tensor? x, Tensor? bias, Tensor? slope, Tensor? mask, int activation,"
      " float negative_slope, float gain, float clamp, bool need_dbias) -> (Tensor dx, Tensor dbias, Tensor dslope)");
  m.def(
      "bias_act_bwd_bwd(Tensor v, Tensor? v_bias, Tensor? v_slope, Tensor? dy, Tensor? x, Tensor? bias, Tensor? slope,"
      " Tensor? mask, int activation, float negative_slope, float gain, float clamp)"
      " -> (Tensor a_dy, Tensor a_x, Tensor a_bias, Tensor a_slope)");
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                        nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
