// Twins of csrc/cuda/cluster.h.
#pragma once

#include "hardware.h"

namespace fuseblock {

// Knows the shared array that it points into, and must stay there.
struct ClusterAddress {
  cuda_emulator::ClusterPlace place;

  ClusterAddress operator+(uint32_t bytes) const {
    ClusterAddress there = *this;
    there.place.at += bytes;
    return there;
  }
  char* check(size_t bytes, const char* operation) const {
    if (place.at < place.begin || place.at + bytes > place.end) {
      cuda_emulator::fail("%s: %zu bytes at byte %td of a shared array of %td", operation, bytes, place.at - place.begin,
                          place.end - place.begin);
    }
    return place.at;
  }
};

inline unsigned cluster_rank() { return cuda_emulator::current->cluster_rank; }
inline unsigned cluster_size() { return cuda_emulator::current->cluster_size; }
inline void cluster_arrive() {
  cuda_emulator::memory_fence();
  cuda_emulator::cluster_arrive();
}
inline void cluster_arrive_relaxed() { cuda_emulator::cluster_arrive(); }
inline void cluster_wait() { cuda_emulator::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

inline ClusterAddress cluster_address(const void* mine, unsigned rank) {
  return {cuda_emulator::cluster_place(mine, rank)};
}

template <class T>
void store_cluster(ClusterAddress to, const T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_emulator::store_remote(to.check(sizeof(T), "st.shared::cluster"), &x, sizeof(T));
}

template <class T>
T load_cluster(ClusterAddress from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const char* const p = from.check(sizeof(T), "ld.shared::cluster");
  cuda_emulator::check_cluster(p, sizeof(T), sizeof(T), "ld.shared::cluster");
  return *reinterpret_cast<const T*>(p);
}

inline void mbarrier_arrive_cluster(ClusterAddress barrier) {
  cuda_emulator::mbarrier_arrive_remote(barrier.check(8, "mbarrier.arrive"));
}

template <class T>
void store_async(ClusterAddress to, const T& x, ClusterAddress barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_emulator::store_async(to.check(sizeof(T), "st.async"), &x, sizeof(T), barrier.check(8, "st.async"));
}

inline void copy_bulk_cluster(ClusterAddress to, const void* shared, uint32_t bytes, ClusterAddress barrier) {
  cuda_emulator::copy_bulk(to.check(bytes, "cp.async.bulk"), shared, bytes, barrier.check(8, "cp.async.bulk"), true);
}

inline void copy_bulk_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  cuda_emulator::check_shared(shared, bytes, 16, "cp.async.bulk");
  cuda_emulator::check_memory(global, bytes);
  cuda_emulator::copy_bulk(shared, global, bytes, barrier, false);
}

inline void copy_bulk_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint16_t blocks) {
  cuda_emulator::check_memory(global, bytes);
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    cuda_emulator::copy_bulk(cluster_address(shared, rank).check(bytes, "cp.async.bulk"), global, bytes,
                             cluster_address(barrier, rank).check(8, "cp.async.bulk"), false);
  }
}

inline void copy_bulk_global(void* global, const void* shared, uint32_t bytes) {
  cuda_emulator::check_memory(global, bytes);
  cuda_emulator::copy_bulk_to_global(global, shared, bytes);
}

inline void copy_bulk_commit() { cuda_emulator::copy_bulk_commit(); }

// Source and destination are touched at the same time here.
template <int kGroups>
void copy_bulk_wait_read() {
  cuda_emulator::copy_bulk_wait(kGroups);
}
template <int kGroups>
void copy_bulk_wait() {
  cuda_emulator::copy_bulk_wait(kGroups);
}

}  // namespace fuseblock
