// The grid tier's forward kernels in float32.
#include "cuda/lstm_recurrence_grid_fwd.cuh"

namespace fuseblock::lstm_grid {

cudaError_t run_float32(const LstmFwd& op, void* stream) {
  if (op.shape.passes == 1) return run<float, 1>(op, stream);
  return op.shape.passes == 3 ? run<float, 3>(op, stream) : cudaErrorInvalidValue;
}

}  // namespace fuseblock::lstm_grid
