// The cluster tier's forward kernels in float32.
#include "cuda/lstm_recurrence_cluster_fwd.cuh"

namespace fuseblock::lstm_cluster {

int run_float32(const LstmFwd& op, void* stream) {
  if (op.shape.passes == 1) return run<float, 1>(op, stream);
  return op.shape.passes == 3 ? run<float, 3>(op, stream) : cudaErrorInvalidValue;
}

int resident_fwd_float32(int64_t hidden) { return resident_fwd<float>(hidden); }

}  // namespace fuseblock::lstm_cluster
