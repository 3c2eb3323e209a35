// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies. sm_90 and newer.
//
// A phase ends when all arrivals have come and all expected bytes have arrived; then the next phase begins. Phases
// alternate in parity, the first has parity 0. Bytes may arrive before they are expected, as long as an arrival of that
// phase is still missing: so one thread arrives and says how many bytes to expect, once per phase.
//
//   FB_SHARED(uint64_t, ready, [2]);
//   if (threadIdx.x == 0) { mbarrier_init(&ready[0], 1); ...; fence_mbarrier_init(); }
//   cluster_sync();                                   others may use it from here on
//   if (threadIdx.x == 0) mbarrier_arrive_expect(&ready[0], bytes);   ...   mbarrier_wait(&ready[0], parity);
//
// All pointers are to this block's shared memory. A thread must wait for every phase, or for none two ahead: parity
// cannot tell phases apart that lie two from each other.
#pragma once

#include "cuda/launch.h"
#include "cuda/spin.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_mbarrier.h"

#else

#include <cstdint>

// Instructions that older devices do not have. Kernels that use them are not launched there (kHasClusters).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FB_ASM_SM90(...) __trap()
#else
#define FB_ASM_SM90(...) asm volatile(__VA_ARGS__)
#endif

namespace fuseblock {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One thread; `arrivals` in every phase.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  FB_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// What the initialising thread does before a cluster barrier, so that other blocks and the copy engine see the barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  FB_ASM_SM90("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Ends the barrier's life, so that its memory can be used for something else.
__device__ __forceinline__ void mbarrier_invalidate(uint64_t* barrier) {
  FB_ASM_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Releases this thread's writes to whoever waits.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  FB_ASM_SM90("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier))
              : "memory");
}

// Arrives, after this phase has been told to expect so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  FB_ASM_SM90("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
                  shared_address(barrier)),
              "r"(bytes)
              : "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  FB_ASM_SM90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
              : "memory");
}

// Whether the phase of that parity has ended; may sleep for a while before it says no. What asynchronous copies brought,
// and what threads of this block wrote before they arrived, can be read then.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended = 0;
  FB_ASM_SM90("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
              : "=r"(ended)
              : "r"(shared_address(barrier)), "r"(parity)
              : "memory");
  return ended != 0;
}

// The same; also what threads of other blocks of the cluster wrote before they arrived.
__device__ __forceinline__ bool mbarrier_try_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t ended = 0;
  FB_ASM_SM90("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
              "selp.u32 %0, 1, 0, p; }"
              : "=r"(ended)
              : "r"(shared_address(barrier)), "r"(parity)
              : "memory");
  return ended != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  FB_SPIN_UNTIL(mbarrier_try_wait(barrier, parity));
}

__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  FB_SPIN_UNTIL(mbarrier_try_wait_cluster(barrier, parity));
}

// What this thread wrote to shared memory before can be read by asynchronous bulk copies issued afterwards, by this thread
// or, after a barrier, by another one. Likewise before bulk copies overwrite what threads have read or written.
__device__ __forceinline__ void fence_async_proxy() {
  FB_ASM_SM90("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fuseblock

#endif
