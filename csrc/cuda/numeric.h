// Scalar types of the kernels: the type that arithmetic is done in, and conversions. Activations: math/scalar.h.
#pragma once

#include "cuda/dtype.h"
#include "cuda/launch.h"
#include "math/lstm_gates.h"
#include "math/scalar.h"

namespace fuseblock {

// Arithmetic, cell states and accumulation: float for 16-bit types, else the type itself.
template <class T>
struct StateType {
  using type = float;
};
template <>
struct StateType<double> {
  using type = double;
};
template <class T>
using State = typename StateType<T>::type;

FB_HD double widen(double x) { return x; }
FB_HD float widen(float x) { return x; }
FB_HD float widen(__half x) { return __half2float(x); }
FB_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even, as PyTorch does.
template <class T>
FB_HD T narrow(State<T> x);
template <>
FB_HD double narrow<double>(double x) { return x; }
template <>
FB_HD float narrow<float>(float x) { return x; }
template <>
FB_HD __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
FB_HD __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

}  // namespace fuseblock
