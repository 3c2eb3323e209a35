// How the blocks of a launch depend on each other, and what a GPU says to that.
#pragma once

#include <cstddef>

namespace fuseblock {

struct Placement {
  unsigned cluster = 1;      // blocks of a cluster, along x
  bool cooperative = false;  // all blocks of the grid run at the same time
};

// Blocks that run at the same time, whole clusters; 0 with the reason (for `explain`) where not even one does.
struct Residency {
  int blocks;
  const char* refusal;
};

struct DeviceLimits {
  bool clusters, cooperative;
  size_t shared_bytes;  // that a block may have
};

// Why the device never runs such a launch, or null.
inline const char* refusal(const DeviceLimits& device, const Placement& placement, size_t shared_bytes) {
  if (placement.cluster > 1 && !device.clusters) return "this GPU has no clusters of blocks";
  if (placement.cooperative && !device.cooperative) return "this GPU has no cooperative launches";
  if (shared_bytes > device.shared_bytes) return "a block would need more shared memory than this GPU has";
  return nullptr;
}

inline Residency residency(int blocks, const Placement& placement) {
  if (blocks > 0) return {blocks, nullptr};
  if (placement.cluster > 1) return {0, "a cluster of this size does not fit on this GPU"};
  return {0, "a block does not fit on this GPU"};
}

}  // namespace fuseblock
