// Launcher of the block tier's forward kernel.
#include "cuda/lstm_recurrence_block_fwd.cuh"

namespace fuseblock::lstm_block {

cudaError_t run(const LstmFwd& op, int dtype, void* stream) {
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % 8 == 0 && is_aligned(op.gx) &&
                       are_aligned({op.h0, op.c0, op.y, op.h_n, op.c_n, op.gates, op.c});
  return dispatch(op.shape, dtype, op.w_hh, aligned, false, [&]<class T, int H, int kTiles, bool kAligned>(dim3 grid) {
    FB_LAUNCH((lstm_block_fwd_kernel<T, H, kTiles, kAligned>), grid, dim3(2 * H), 0, stream, op);
    return cudaGetLastError();
  });
}

}  // namespace fuseblock::lstm_block

int launch_lstm_block_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream) {
  return fuseblock::lstm_block::run(*op, dtype, stream);
}
