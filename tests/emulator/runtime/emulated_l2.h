// Twins of csrc/cuda/l2.h.
#pragma once

#include "hardware.h"

namespace fuseblock {

inline void add_release(unsigned* counter, unsigned n) {
  cuda_emulator::memory_fence();
  __atomic_fetch_add(counter, n, __ATOMIC_RELEASE);
}

// Lets others run, as it is called in loops.
inline unsigned load_acquire(const unsigned* counter) {
  cuda_emulator::yield();
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

inline void wait_for_count(const unsigned* counter, unsigned target) {
  cuda_emulator::wait_for_count(counter, target);
  (void)__atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

template <class T>
T load_l2(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_emulator::check_alignment(p, sizeof(T), "ld.global.cg");
  cuda_emulator::memory_fence();
  return *p;
}

// Arrives at the latest when this thread does something that orders memory.
template <class T>
void store_l2(T* p, const T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_emulator::check_alignment(p, sizeof(T), "st.global.cg");
  cuda_emulator::check_memory(p, sizeof(T));
  cuda_emulator::store_global(p, &x, sizeof(T));
}

}  // namespace fuseblock
