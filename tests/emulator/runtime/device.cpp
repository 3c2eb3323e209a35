// What launchers ask the CUDA runtime about the device.
#include "device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "scheduler.h"

namespace cuda_emulator {
namespace {

Device g_device;
thread_local cudaError_t t_last_error = cudaSuccess;

}  // namespace

void set_device(const Device& device) { g_device = device; }

const Device& device() { return g_device; }

size_t shared_memory_limit() { return g_device.shared_bytes; }

fuseblock::Residency resident_blocks(const fuseblock::Placement& placement, dim3 block, size_t shared_bytes) {
  const fuseblock::DeviceLimits limits{g_device.clusters, g_device.cooperative, g_device.shared_bytes};
  if (const char* why = refusal(limits, placement, shared_bytes)) return {0, why};
  const unsigned by_threads = g_device.threads / std::max(1u, block.x * block.y * block.z);
  const unsigned by_shared = static_cast<unsigned>((g_device.shared_bytes + 1024) / (shared_bytes + 1024));
  const unsigned each = std::min({by_threads, by_shared, 32u});  // of a multiprocessor
  if (placement.cluster <= 1) return residency(static_cast<int>(each) * g_device.multiprocessors, placement);
  if (placement.cluster > g_device.largest_cluster) return residency(0, placement);
  const unsigned neighbours = static_cast<unsigned>(g_device.neighbours);
  const unsigned groups = static_cast<unsigned>(g_device.multiprocessors) / neighbours;
  const unsigned clusters = each * neighbours / placement.cluster * groups;
  return residency(static_cast<int>(clusters * placement.cluster), placement);
}

cudaError_t launch_placed(const fuseblock::Placement& placement, dim3 grid, dim3 block, size_t shared_bytes,
                          const std::function<void()>& thread) {
  const fuseblock::Residency resident = resident_blocks(placement, block, shared_bytes);
  if (resident.blocks == 0) {
    const bool is_cluster = placement.cluster > 1 && g_device.clusters;
    return t_last_error = is_cluster ? cudaErrorInvalidClusterSize : cudaErrorInvalidConfiguration;
  }
  const uint64_t blocks = 1ull * grid.x * grid.y * grid.z;
  if (placement.cooperative && blocks > static_cast<uint64_t>(resident.blocks)) return cudaErrorCooperativeLaunchTooLarge;
  launch({grid, block, shared_bytes, placement.cooperative, std::max(1u, placement.cluster), true}, thread);
  return cudaSuccess;
}

}  // namespace cuda_emulator

// What the launchers call instead of the CUDA runtime's. Launches are over when they return, and throw what a kernel does
// wrong: the only error to fetch is that of a launch that was refused.
extern "C" cudaError_t cudaGetLastError() { return std::exchange(cuda_emulator::t_last_error, cudaSuccess); }

extern "C" cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(to) + row * pitch, value, width);
  return cudaSuccess;
}
