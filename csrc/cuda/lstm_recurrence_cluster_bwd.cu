// Launcher of the cluster tier's backward kernel.
#include "cuda/lstm_recurrence_cluster_bwd.cuh"

namespace fuseblock::lstm_cluster {

int run(const LstmBwd& op, int dtype, void* stream) {
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  const auto aligned = [&](int width) {
    return op.shape.hidden % width == 0 && is_aligned(op.dy, width) && are_aligned({op.gates, op.dgx});
  };
  // One tile leaves registers for gradients that only second derivatives bring.
  const bool one_tile = op.d_gates != nullptr || op.d_c != nullptr;
  return dispatch(op.shape, dtype, op.w_hh, aligned, one_tile,
                  [&]<class T, class Class, int kTiles, bool kAligned>(dim3 grid) {
    constexpr size_t kBytes = BackwardMemory<T, Class, kTiles, kAligned>::bytes();
    static_assert(kBytes <= kMostSharedBytes);
    return FB_LAUNCH_PLACED((lstm_cluster_bwd_kernel<T, Class, kTiles, kAligned, 1>), Placement{Class::kCluster}, grid,
                            dim3(Class::kThreads), kBytes, stream, op);
  });
}

int bwd_resident(int64_t hidden, int dtype) {
  return with_class(hidden, dtype, 0, [&]<class T, class Class>() {
    // Of two tiles, which take more shared memory.
    return FB_RESIDENT_BLOCKS((lstm_cluster_bwd_kernel<T, Class, 2, true, 1>), Placement{Class::kCluster},
                              dim3(Class::kThreads), (BackwardMemory<T, Class, 2, true>::bytes()))
        .blocks;
  });
}

}  // namespace fuseblock::lstm_cluster

int launch_lstm_cluster_bwd(const fuseblock::LstmBwd* op, int dtype, void* stream) {
  return fuseblock::lstm_cluster::run(*op, dtype, stream);
}

int lstm_cluster_bwd_resident(int64_t hidden, int dtype) { return fuseblock::lstm_cluster::bwd_resident(hidden, dtype); }
