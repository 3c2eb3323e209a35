// Launcher of the grid tier's forward kernel, and its instances in 16 bit.
#include "cuda/lstm_recurrence_grid_fwd.cuh"

int launch_lstm_grid_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream) {
  using namespace fuseblock;
  if (dtype == kFloat16) return lstm_grid::run<__half, 1>(*op, stream);
  if (dtype == kBFloat16) return lstm_grid::run<__nv_bfloat16, 1>(*op, stream);
  return dtype == kFloat32 ? lstm_grid::run_float32(*op, stream) : cudaErrorInvalidValue;
}

int lstm_grid_fwd_resident(int64_t, int) {
  using namespace fuseblock::lstm_grid;
  const fuseblock::Placement placement{.cooperative = true};
  return FB_RESIDENT_BLOCKS((lstm_grid_fwd_kernel<__half, 1, 32>), placement, dim3(kThreads), 0).blocks;
}
