// Scalar types as the C interface of the launchers numbers them.
#pragma once

namespace fuseblock {

enum DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace fuseblock
