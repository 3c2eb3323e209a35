// Two-dimensional views as plain data: the C interface of the launchers. No CUDA here, so that any C++ can include it.
#pragma once

#include <cstdint>

namespace fuseblock {

// Rows of contiguous elements; the row stride is in elements. data is null where an optional tensor is absent.
struct Rows {
  void* data;
  int64_t stride;
};

}  // namespace fuseblock
