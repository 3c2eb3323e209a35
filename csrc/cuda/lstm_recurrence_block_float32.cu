// The block tier's kernels in float32.
#include "cuda/lstm_recurrence_block_bwd.cuh"
#include "cuda/lstm_recurrence_block_fwd.cuh"

namespace fuseblock::lstm_block {
namespace {

template <class Op>
cudaError_t run_passes(const Op& op, void* stream) {
  if (op.shape.passes == 1) return run<float, 1>(op, stream);
  return op.shape.passes == 3 ? run<float, 3>(op, stream) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run_float32(const LstmFwd& op, void* stream) { return run_passes(op, stream); }
cudaError_t run_float32(const LstmBwd& op, void* stream) { return run_passes(op, stream); }

}  // namespace fuseblock::lstm_block
