// Launchers of batch_norm_act_resident.cuh: which shapes fit, in how many blocks.
#include "cuda/batch_norm_act_resident.cuh"

#include "cuda/batch_norm_act_launch.h"
#include "cuda/batch_norm_act_resident.h"

namespace fuseblock {
namespace {

// Blocks of a cluster at most: every GPU with clusters runs so many.
constexpr int64_t kMostBlocks = 8;
// Enough for every multiprocessor of a large GPU: fewer and smaller clusters than that leave it idle.
constexpr unsigned kEnoughBlocks = 128;
// Channels-last rows of a chunk are at least so many bytes, unless a tensor has fewer channels: two sectors.
constexpr int64_t kNarrowest = 64;

struct ResidentPlan {
  BatchNormAct op;
  ChannelGrid grid;
  unsigned cluster;
  int visits;  // of a thread, at most
  size_t column_bytes;
};

// The widest chunks and smallest clusters that fit into `shared_bytes` and keep the device busy; else those with the most
// blocks. `width`: elements of a visit, of `bytes` in each of the `tensors`.
bool plan(const BatchNormAct& op, int width, int64_t bytes, int tensors, int64_t shared_bytes, bool clusters,
          ResidentPlan& best) {
  const int64_t vectors = op.channels_last ? op.channels / width : 1;
  const int64_t visits = op.channels_last ? op.size : op.samples * (op.size / width);
  const int64_t narrowest = std::min(divide_up(kNarrowest, bytes), vectors);
  bool found = false;
  for (int64_t most = std::min<int64_t>(kMostAcross, vectors); most >= narrowest; most /= 2) {
    for (int64_t blocks = 1; blocks <= (clusters ? kMostBlocks : 1); blocks *= 2) {
      ResidentPlan to{op, {}, static_cast<unsigned>(blocks), 0, 0};
      if (!make_grid(to.op, width, 1, divide_up(vectors, most), blocks, true, to.grid)) continue;
      const int64_t along = to.grid.threads.y, each = divide_up(visits, blocks * along);
      if (visits <= (blocks - 1) * along) break;  // the last one would have nothing
      const int64_t column_bytes = tensors * each * bytes * along * to.grid.threads.x;
      if (column_bytes > shared_bytes || (found && to.grid.blocks.x <= best.grid.blocks.x)) continue;
      to.visits = static_cast<int>(each), to.column_bytes = static_cast<size_t>(column_bytes);
      best = to, found = true;
      if (to.grid.blocks.x >= kEnoughBlocks) return true;
    }
  }
  return found;
}

// In half of a multiprocessor's shared memory if possible, else in all of it.
bool plan_on(const DeviceLimits& device, const BatchNormAct& op, int width, int64_t bytes, int tensors,
             size_t reduction_bytes, ResidentPlan& best) {
  constexpr int64_t kReserved = 1024;  // for the system, of each block
  for (const int64_t share : {2, 1}) {
    const int64_t own = (static_cast<int64_t>(device.shared_bytes) + kReserved) / share - kReserved;
    if (plan(op, width, bytes, tensors, own - static_cast<int64_t>(reduction_bytes), device.clusters, best)) return true;
  }
  return false;
}

// Whether the launch came about. A driver may refuse clusters that its devices have, where MIG or MPS leave no room for one.
bool is_taken(const ResidentPlan& plan, cudaError_t error) {
  if (error == cudaSuccess || plan.cluster == 1) return true;
  cudaGetLastError();  // the launches that come instead are not to be blamed for it
  return false;
}

}  // namespace

template <class T>
bool resident_fwd(const BatchNormAct& op, const DeviceLimits& device, void* stream, cudaError_t& error) {
  if constexpr (kChannelWidth<T> == 1) return false;
  else {
    using S = State<T>;
    ResidentPlan to;
    if (!can_vectorise<T, kSpan>(op)) return false;
    const size_t reduction = reduction_bytes<S>(op.channels_last ? 2 * kSpan + 1 : 3);
    if (!plan_on(device, op, kSpan, kSpan * sizeof(T), 1, reduction, to)) return false;
    const Placement placement{to.cluster};
    if (op.channels_last) {
      error = FB_LAUNCH_PLACED((batch_norm_act_whole_fwd_kernel<T, kSpan, kSpan>), placement, to.grid.blocks, to.grid.threads,
                               to.column_bytes, stream, to.op);
    } else {
      error = FB_LAUNCH_PLACED((batch_norm_act_whole_fwd_kernel<T, kSpan, 1>), placement, to.grid.blocks, to.grid.threads,
                               to.column_bytes, stream, to.op);
    }
    return is_taken(to, error);
  }
}

template <class T>
bool resident_bwd(const BatchNormAct& op, const DeviceLimits& device, void* stream, cudaError_t& error) {
  if constexpr (kChannelWidth<T> == 1) return false;
  else {
    using S = State<T>;
    constexpr int width = kChannelWidth<T>;
    ResidentPlan to;
    if (!can_vectorise<T, width>(op)) return false;
    const size_t reduction = reduction_bytes<S>(op.channels_last ? 3 * width : 3);
    if (!plan_on(device, op, width, width * sizeof(T), 2, reduction, to)) return false;
    const Placement placement{to.cluster};
    const int rows = op.activation == static_cast<int>(Activation::prelu) ? 3 : 2;
    if (op.channels_last) {
      error = FB_LAUNCH_PLACED((batch_norm_act_whole_bwd_kernel<T, width, width>), placement, to.grid.blocks,
                               to.grid.threads, to.column_bytes, stream, to.op, rows, to.visits);
    } else {
      error = FB_LAUNCH_PLACED((batch_norm_act_whole_bwd_kernel<T, width, 1>), placement, to.grid.blocks, to.grid.threads,
                               to.column_bytes, stream, to.op, rows, to.visits);
    }
    return is_taken(to, error);
  }
}

#define FB_RESIDENT(T)                                                                          \
  template bool resident_fwd<T>(const BatchNormAct&, const DeviceLimits&, void*, cudaError_t&); \
  template bool resident_bwd<T>(const BatchNormAct&, const DeviceLimits&, void*, cudaError_t&);
FB_RESIDENT(double)
FB_RESIDENT(float)
FB_RESIDENT(__half)
FB_RESIDENT(__nv_bfloat16)

}  // namespace fuseblock
