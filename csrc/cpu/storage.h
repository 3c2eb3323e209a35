// Element types of tensors as the CPU kernels see them; free of torch and of any instruction set.
#pragma once

#include <cstdint>

namespace fuseblock::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType { f32, f64, f16, bf16 };

// The type of arithmetic, of cell states and of carries ("state dtype").
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace fuseblock::cpu
