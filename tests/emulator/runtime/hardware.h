// What the emulated PTX instructions ask of the runtime: checks of addresses, asynchronous copies, clusters, mbarriers.
#pragma once

#include "cuda_emulator.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);
#endif

namespace cuda_emulator {

// Fails unless [p, p + bytes) lies in the block's shared memory and p is a multiple of alignment.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* operation);
// The same for shared memory of any block of the cluster; with `store`, remote stores of this thread arrive first.
void check_cluster(const void* p, size_t bytes, size_t alignment, const char* operation);
void check_alignment(const void* p, size_t alignment, const char* operation);

// For AddressSanitizer, which sees an asynchronous copy only when it arrives: reports bad memory where it is asked for.
inline void check_memory([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes)) (void)*static_cast<volatile const char*>(bad);
#endif
}

// barrier.sync or, without `wait`, barrier.arrive.
void named_barrier(unsigned id, unsigned threads, bool wait);

// cp.async: `bytes` are copied and zeros follow. Arrives at any time before the wait that leaves fewer groups under way.
void copy_async(void* destination, const void* source, uint32_t bytes, uint32_t zeros);
void copy_async_commit();
void copy_async_wait(uint64_t groups_left);
void copy_async_wait_all();

// A place in a shared array.
struct ClusterPlace {
  char *at, *begin, *end;
};
// Where p, in this block's shared memory, is in block `rank` of the cluster.
ClusterPlace cluster_place(const void* p, unsigned rank);
// barrier.cluster
void cluster_arrive();
void cluster_wait();
// st.shared::cluster: arrives at the latest when this thread does something that orders memory.
void store_remote(void* destination, const void* value, uint32_t bytes);
// A store to global memory that arrives in the same way.
void store_global(void* destination, const void* value, uint32_t bytes);
// st.async
void store_async(void* destination, const void* value, uint32_t bytes, void* mbarrier);
// cp.async.bulk to shared memory of the cluster; the source lies in this block's shared memory or in global memory.
void copy_bulk(void* destination, const void* source, uint32_t bytes, void* mbarrier, bool from_shared);
// cp.async.bulk from shared to global memory, in groups.
void copy_bulk_to_global(void* destination, const void* source, uint32_t bytes);
void copy_bulk_commit();
void copy_bulk_wait(uint64_t groups_left);

// fence.proxy.async and fence.mbarrier_init
void fence_async_proxy();
void fence_mbarrier_init();

void mbarrier_init(void* mbarrier, unsigned arrivals);
void mbarrier_invalidate(void* mbarrier);
// An arrival at an mbarrier of any block of the cluster, which takes its time.
void mbarrier_arrive_remote(void* mbarrier);
void mbarrier_arrive(void* mbarrier, const char* operation);
void mbarrier_expect(void* mbarrier, uint32_t bytes, const char* operation);
bool mbarrier_try_wait(void* mbarrier, unsigned parity);
void mbarrier_wait(void* mbarrier, unsigned parity);

}  // namespace cuda_emulator
