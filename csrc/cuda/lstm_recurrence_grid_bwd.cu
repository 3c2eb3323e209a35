// Launcher of the grid tier's backward kernel.
#include "cuda/lstm_recurrence_grid_bwd.cuh"

namespace fuseblock::lstm_grid {

cudaError_t run(const LstmBwd& op, int dtype, void* stream) {
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  return dispatch(op.shape, dtype, op.w_hh, op.workspace, op.workspace_bytes, true,
                  [&]<class T, int kPasses, int S>(const Plan& plan) {
    constexpr int kWidth = kVectorWidth<T>;
    const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.dy, kWidth) && are_aligned({op.gates, op.dgx});
    const dim3 grid(static_cast<unsigned>(plan.teams * plan.blocks));
    return FB_LAUNCH_COOPERATIVE((lstm_grid_bwd_kernel<T, kPasses, S>), grid, dim3(kThreads), plan.shared_bytes, stream, op,
                                 plan, aligned);
  });
}

}  // namespace fuseblock::lstm_grid

int launch_lstm_grid_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream) {
  return fuseblock::lstm_grid::run(*op, dtype, stream);
}
