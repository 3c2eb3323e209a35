// The bits that bias_act's backward needs of a piecewise linear activation; python/fuseblock/reference/bias_act.py.
#pragma once

#include "pointwise.h"

namespace fuseblock {

// Bits an element: nothing; passes or not; positive or not; positive or not, and passes or not.
enum class MaskKind { none, gate, sign, sign_gate };

FB_HD bool is_clamped(double clamp) { return clamp <= 1.7976931348623157e308; }

FB_HD MaskKind mask_kind(Activation a, double clamp) {
  if (a == Activation::identity) return is_clamped(clamp) ? MaskKind::gate : MaskKind::none;
  if (a == Activation::relu) return MaskKind::gate;
  if (a == Activation::leaky_relu) return is_clamped(clamp) ? MaskKind::sign_gate : MaskKind::sign;
  return MaskKind::none;
}

FB_HD int64_t mask_planes(MaskKind kind) { return kind == MaskKind::sign_gate ? 2 : kind == MaskKind::none ? 0 : 1; }

// Whether backward computes from x: smooth activations, and prelu for its slope's gradient.
FB_HD bool keeps_x(Activation a) { return a >= Activation::prelu; }

}  // namespace fuseblock
