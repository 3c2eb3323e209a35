// Launcher of the block tier's forward kernel for whole layers, and its instances.
#include "cuda/lstm_recurrence_block_layer.cuh"

int launch_lstm_block_layer_fwd(const fuseblock::LstmLayerFwd* op, int dtype, void* stream) {
  using namespace fuseblock;
  if (dtype == kFloat16) return lstm_block::run_layer<__half>(*op, stream);
  return dtype == kBFloat16 ? lstm_block::run_layer<__nv_bfloat16>(*op, stream) : cudaErrorInvalidValue;
}
