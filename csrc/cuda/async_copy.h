// cp.async: copies from global to shared memory that run beside the thread that issued them. Any GPU since sm_80.
//
//   copy_async<16>(shared, global); ...  copy_async_commit();   a group
//   copy_async_wait<1>();                all groups of this thread but the last one have arrived: for this thread, and
//   __syncthreads();                     after a barrier for the others
//
// A thread waits for all of its copies before it returns.
#pragma once

#include "cuda/launch.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_async_copy.h"

#else

#include <cstdint>

namespace fuseblock {

// kBytes (4, 8, 16) from a multiple of kBytes to another. 16 bytes bypass L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(__cvta_generic_to_global(global))
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(__cvta_generic_to_global(global)),
                 "n"(kBytes)
                 : "memory");
  }
}

// The first `bytes` (0 to kBytes) are copied, the rest is zero. Nothing beyond them is read: with 0, any address will do.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, uint32_t bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(global)),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(__cvta_generic_to_global(global)),
                 "r"(bytes), "n"(kBytes)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// At most the last kGroups committed groups are still under way afterwards.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Committed or not.
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fuseblock

#endif
