// C interface of the LSTM step kernels: one launch does the elementwise math of `rows` x `hidden` cells.
//
// The equations are in math/lstm_gates.h. Views of 4 * hidden columns hold gates in the order i, f, g, o. T is the dtype
// of the gates, S the state dtype (float for 16-bit T, else T), C the dtype of cell states and of their gradients: T or S
// in the lstm_gates functions, S in the lstm_step functions. A view whose data is null is absent: an input means zeros,
// an output is not written. Views may have any row stride; outputs may be the same view as an input.
//
// lengths (null: every row is active): row r is active where t < lengths[r]. What inactive rows must ignore is not read.
//
// Every launcher returns a cudaError_t; invalid dtypes or sizes beyond the grid give cudaErrorInvalidValue.
#pragma once

#include "cuda/rows.h"

namespace fuseblock {

struct LstmStepShape {
  int64_t rows, hidden;
  const int64_t* lengths;
  int64_t t;
};

struct LstmStepFwd {
  LstmStepShape shape;
  Rows pre;      // T, 4 * hidden: pre-activations
  Rows c_prev;   // C
  Rows h;        // T: m; 0 in inactive rows
  Rows c;        // C: the new state; c_prev in inactive rows
  Rows acts;     // T, 4 * hidden: activated gates; 0 in inactive rows
  Rows h_state;  // T: active rows receive m, the others stay untouched
};

struct LstmStepBwd {
  LstmStepShape shape;
  Rows gates;     // T, 4 * hidden: activated gates (lstm_step), pre-activations (lstm_gates)
  Rows c_prev;    // C
  Rows c;         // C: the new state (lstm_step; lstm_gates recomputes it)
  Rows dm, dy;    // T: gradients of m, added up; dy counts in active rows only
  Rows dc, d_c;   // C: gradients of the new state, added up
  Rows ext;       // T, 4 * hidden: gradients of the activated gates
  Rows delta;     // T, 4 * hidden out: gradient of the pre-activations; 0 in inactive rows
  Rows dc_prev;   // C out: gradient of c_prev; dc + d_c in inactive rows
  Rows dm_keep;   // T out: 0 in active rows, dm in inactive ones
  Rows dc_total;  // C out: whole gradient of the new state, m's share included; dc + d_c in inactive rows
};

struct LstmStepBwdBwd {
  LstmStepShape shape;
  Rows gates, c_prev, c;  // as in LstmStepBwd
  Rows dm;                // T: the whole gradient of m
  Rows dc;                // C: dc_total (lstm_step), the gradient of the new state without m's share (lstm_gates)
  Rows ext;               // T, 4 * hidden
  Rows v;                 // T, 4 * hidden: cotangent of delta
  Rows v_dc_prev;         // C: cotangent of dc_prev
  Rows a_dm;              // T out: adjoint of dm; 0 in inactive rows
  Rows a_dc;              // C out: adjoint of dc; v_dc_prev in inactive rows
  Rows a_ext;             // T out, 4 * hidden: adjoint of ext; 0 in inactive rows
  Rows a_gates;           // T out, 4 * hidden: adjoint of gates; 0 in inactive rows
  Rows a_c_prev;          // C out: adjoint of c_prev; lstm_step ADDS it, lstm_gates writes it
  Rows a_c;               // C out: adjoint of c (lstm_step); 0 in inactive rows
  Rows a_dm_state;        // T out: active rows receive a_dm, the others stay untouched
};

}  // namespace fuseblock

// dtype, c_dtype: fuseblock::DType numbers of T and C.
extern "C" {
int launch_lstm_step_fwd(const fuseblock::LstmStepFwd* step, int dtype, int c_dtype, void* stream);
int launch_lstm_step_bwd(const fuseblock::LstmStepBwd* step, int dtype, int c_dtype, void* stream);
int launch_lstm_step_bwd_bwd(const fuseblock::LstmStepBwdBwd* step, int dtype, int c_dtype, void* stream);
int launch_lstm_gates_bwd(const fuseblock::LstmStepBwd* step, int dtype, int c_dtype, void* stream);
int launch_lstm_gates_bwd_bwd(const fuseblock::LstmStepBwdBwd* step, int dtype, int c_dtype, void* stream);
}
