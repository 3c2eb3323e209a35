// Launcher of the block tier's backward kernel.
#include "cuda/lstm_recurrence_block_bwd.cuh"

namespace fuseblock::lstm_block {

cudaError_t run(const LstmBwd& op, int dtype, void* stream) {
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % 8 == 0 && is_aligned(op.dy) &&
                       are_aligned({op.dh_n, op.dc_n, op.d_gates, op.d_c, op.gates, op.c, op.c0, op.dgx, op.dh0, op.dc0});
  // One tile leaves registers for gradients that only second derivatives bring, and for the weights of the largest class.
  constexpr int kLargestOfTwoTiles = 96;
  const bool one_tile = op.d_gates != nullptr || op.d_c != nullptr || op.shape.hidden > kLargestOfTwoTiles;
  return dispatch(op.shape, dtype, op.w_hh, aligned, one_tile, [&]<class T, int H, int kTiles, bool kAligned>(dim3 grid) {
    if constexpr (kTiles == 2 && H > kLargestOfTwoTiles) {
      return cudaErrorInvalidValue;
    } else {
      FB_LAUNCH((lstm_block_bwd_kernel<T, H, kTiles, kAligned>), grid, dim3(2 * H), 0, stream, op);
      return cudaGetLastError();
    }
  });
}

}  // namespace fuseblock::lstm_block

int launch_lstm_block_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream) {
  return fuseblock::lstm_block::run(*op, dtype, stream);
}
