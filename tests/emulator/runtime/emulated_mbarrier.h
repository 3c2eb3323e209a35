// Twins of csrc/cuda/mbarrier.h.
#pragma once

#include "hardware.h"

namespace fuseblock {

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { cuda_emulator::mbarrier_init(barrier, arrivals); }
inline void mbarrier_invalidate(uint64_t* barrier) { cuda_emulator::mbarrier_invalidate(barrier); }
inline void fence_mbarrier_init() { cuda_emulator::fence_mbarrier_init(); }
inline void fence_async_proxy() { cuda_emulator::fence_async_proxy(); }

inline void mbarrier_arrive(uint64_t* barrier) { cuda_emulator::mbarrier_arrive(barrier, "mbarrier.arrive"); }

inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  cuda_emulator::mbarrier_expect(barrier, bytes, "mbarrier.expect_tx");
}

inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  cuda_emulator::mbarrier_expect(barrier, bytes, "mbarrier.arrive.expect_tx");
  cuda_emulator::mbarrier_arrive(barrier, "mbarrier.arrive.expect_tx");
}

// Lets others run where the phase has not ended, as the hardware may.
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  if (cuda_emulator::mbarrier_try_wait(barrier, parity)) return true;
  cuda_emulator::yield();
  return false;
}
inline bool mbarrier_try_wait_cluster(uint64_t* barrier, uint32_t parity) { return mbarrier_try_wait(barrier, parity); }

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { cuda_emulator::mbarrier_wait(barrier, parity); }
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { cuda_emulator::mbarrier_wait(barrier, parity); }

}  // namespace fuseblock
