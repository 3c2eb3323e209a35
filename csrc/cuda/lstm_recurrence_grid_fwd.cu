// Launcher of the grid tier's forward kernel.
#include "cuda/lstm_recurrence_grid_fwd.cuh"

namespace fuseblock::lstm_grid {

cudaError_t run(const LstmFwd& op, int dtype, void* stream) {
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  return dispatch(op.shape, dtype, op.w_hh, op.workspace, op.workspace_bytes, false,
                  [&]<class T, int kPasses, int S>(const Plan& plan) {
    constexpr int kWidth = kVectorWidth<T>;
    const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.gx, kWidth) && are_aligned({op.h0, op.y, op.gates});
    const dim3 grid(static_cast<unsigned>(plan.teams * plan.blocks));
    return FB_LAUNCH_COOPERATIVE((lstm_grid_fwd_kernel<T, kPasses, S>), grid, dim3(kThreads), plan.shared_bytes, stream, op,
                                 plan, aligned);
  });
}

}  // namespace fuseblock::lstm_grid

int launch_lstm_grid_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream) {
  return fuseblock::lstm_grid::run(*op, dtype, stream);
}
