// Launcher of the cluster tier's forward kernel, and its instances in 16 bit.
#include "cuda/lstm_recurrence_cluster_fwd.cuh"

int launch_lstm_cluster_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream) {
  using namespace fuseblock;
  if (dtype == kFloat16) return lstm_cluster::run<__half, 1>(*op, stream);
  if (dtype == kBFloat16) return lstm_cluster::run<__nv_bfloat16, 1>(*op, stream);
  return dtype == kFloat32 ? lstm_cluster::run_float32(*op, stream) : cudaErrorInvalidValue;
}

int lstm_cluster_fwd_resident(int64_t hidden, int dtype) {
  using namespace fuseblock;
  if (dtype == kFloat16) return lstm_cluster::resident_fwd<__half>(hidden);
  if (dtype == kBFloat16) return lstm_cluster::resident_fwd<__nv_bfloat16>(hidden);
  return dtype == kFloat32 ? lstm_cluster::resident_fwd_float32(hidden) : 0;
}
