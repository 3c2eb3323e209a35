// Blocks of a cluster: their barrier, each other's shared memory, copies into it. sm_90 and newer.
//
//   a block's shared memory may be touched by its peers from the first cluster_sync() on, until it passes its last one;
//   ClusterAddress there = cluster_address(&buffer[n], rank);    where &buffer[n] of this block lies in block `rank`
//   copy_bulk_cluster(there, here, bytes, cluster_address(&ready, rank));   arrives some time; `ready` there counts bytes
//
// Asynchronous copies: the source must stay as it is until the data have arrived. That is known when the receiver answers.
#pragma once

#include "cuda/mbarrier.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "emulated_cluster.h"

#else

namespace fuseblock {

// A place in the shared memory of a block of the cluster.
struct ClusterAddress {
  uint32_t value;

  __device__ __forceinline__ ClusterAddress operator+(uint32_t bytes) const { return {value + bytes}; }
};

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  FB_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Blocks of the cluster.
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  FB_ASM_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all blocks arrive, releasing what they wrote; and wait, acquiring what all others wrote.
__device__ __forceinline__ void cluster_arrive() {
  FB_ASM_SM90("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { FB_ASM_SM90("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Arrives without ordering memory, which is cheaper: so that nobody returns while others still send to it.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  FB_ASM_SM90("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ ClusterAddress cluster_address(const void* mine, unsigned rank) {
  ClusterAddress there{0};
  FB_ASM_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there.value) : "r"(shared_address(mine)), "r"(rank));
  return there;
}

// T of 4, 8 or 16 bytes, at a multiple of its size. Visible to the other block after a barrier with release and acquire.
template <class T>
__device__ __forceinline__ void store_cluster(ClusterAddress to, const T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t v[sizeof(T) / 4];
  memcpy(v, &x, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    FB_ASM_SM90("st.shared::cluster.u32 [%0], %1;" ::"r"(to.value), "r"(v[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    FB_ASM_SM90("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to.value), "r"(v[0]), "r"(v[1]) : "memory");
  } else {
    FB_ASM_SM90("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.value), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                "r"(v[3])
                : "memory");
  }
}

template <class T>
__device__ __forceinline__ T load_cluster(ClusterAddress from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t v[sizeof(T) / 4] = {};
  if constexpr (sizeof(T) == 4) {
    FB_ASM_SM90("ld.shared::cluster.u32 %0, [%1];" : "=r"(v[0]) : "r"(from.value) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    FB_ASM_SM90("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from.value) : "memory");
  } else {
    FB_ASM_SM90("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                : "r"(from.value)
                : "memory");
  }
  T x;
  memcpy(&x, v, sizeof(T));
  return x;
}

// Arrives at an mbarrier of any block of the cluster, with everything that this thread wrote before. The other side waits
// with mbarrier_wait_cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(ClusterAddress barrier) {
  FB_ASM_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.value) : "memory");
}

// T of 4, 8 or 16 bytes, at a multiple of its size; the mbarrier in the block that receives it counts them.
template <class T>
__device__ __forceinline__ void store_async(ClusterAddress to, const T& x, ClusterAddress barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t v[sizeof(T) / 4];
  memcpy(v, &x, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    FB_ASM_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to.value), "r"(v[0]),
                "r"(barrier.value)
                : "memory");
  } else if constexpr (sizeof(T) == 8) {
    FB_ASM_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(to.value),
                "r"(v[0]), "r"(v[1]), "r"(barrier.value)
                : "memory");
  } else {
    FB_ASM_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                    to.value),
                "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier.value)
                : "memory");
  }
}

// Bulk copies: one thread issues; addresses and sizes are multiples of 16. fence_async_proxy() by the threads that wrote the
// source, then a barrier, come before.

// From this block's shared memory to any block's, whose mbarrier counts the bytes.
__device__ __forceinline__ void copy_bulk_cluster(ClusterAddress to, const void* shared, uint32_t bytes,
                                                  ClusterAddress barrier) {
  FB_ASM_SM90("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  to.value),
              "r"(shared_address(shared)), "r"(bytes), "r"(barrier.value)
              : "memory");
}

// From global to this block's shared memory.
__device__ __forceinline__ void copy_bulk_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  FB_ASM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  shared_address(shared)),
              "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
              : "memory");
}

// From global memory to the same place in every block whose bit (of its rank) is set; each one's own mbarrier counts.
__device__ __forceinline__ void copy_bulk_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                                    uint16_t blocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
      ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)),
      "h"(blocks)
      : "memory");
#else
  // Machine code for whole families of devices had better not use multicast, says ptxas.
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    FB_ASM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    cluster_address(shared, rank).value),
                "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(cluster_address(barrier, rank).value)
                : "memory");
  }
#endif
}

// From shared to global memory, in groups that the issuing thread commits and waits for.
__device__ __forceinline__ void copy_bulk_global(void* global, const void* shared, uint32_t bytes) {
  FB_ASM_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
              "r"(shared_address(shared)), "r"(bytes)
              : "memory");
}
__device__ __forceinline__ void copy_bulk_commit() { FB_ASM_SM90("cp.async.bulk.commit_group;" ::: "memory"); }

// At most the last kGroups groups are still under way; of the others the source may be overwritten.
template <int kGroups>
__device__ __forceinline__ void copy_bulk_wait_read() {
  FB_ASM_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
// The same; the others have arrived. A thread calls copy_bulk_wait_read<0> at least before its block returns.
template <int kGroups>
__device__ __forceinline__ void copy_bulk_wait() {
  FB_ASM_SM90("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace fuseblock

#endif
