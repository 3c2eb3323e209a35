// Launcher of the cluster tier's forward kernel.
#include "cuda/lstm_recurrence_cluster_fwd.cuh"

namespace fuseblock::lstm_cluster {

int run(const LstmFwd& op, int dtype, void* stream) {
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  const auto aligned = [&](int width) {
    return op.shape.hidden % width == 0 && is_aligned(op.gx, width) && are_aligned({op.h0, op.y, op.gates});
  };
  return dispatch(op.shape, dtype, op.w_hh, aligned, false, [&]<class T, class Class, int kTiles, bool kAligned>(dim3 grid) {
    constexpr size_t kBytes = ForwardMemory<T, Class, kTiles, kAligned>::bytes();
    static_assert(kBytes <= kMostSharedBytes);
    return FB_LAUNCH_PLACED((lstm_cluster_fwd_kernel<T, Class, kTiles, kAligned, 1>), Placement{Class::kCluster}, grid,
                            dim3(Class::kThreads), kBytes, stream, op);
  });
}

int fwd_resident(int64_t hidden, int dtype) {
  return with_class(hidden, dtype, 0, [&]<class T, class Class>() {
    // Of two tiles, which take more shared memory.
    return FB_RESIDENT_BLOCKS((lstm_cluster_fwd_kernel<T, Class, 2, true, 1>), Placement{Class::kCluster},
                              dim3(Class::kThreads), (ForwardMemory<T, Class, 2, true>::bytes()))
        .blocks;
  });
}

}  // namespace fuseblock::lstm_cluster

int launch_lstm_cluster_fwd(const fuseblock::LstmFwd* op, int dtype, void* stream) {
  return fuseblock::lstm_cluster::run(*op, dtype, stream);
}

int lstm_cluster_fwd_resident(int64_t hidden, int dtype) { return fuseblock::lstm_cluster::fwd_resident(hidden, dtype); }
