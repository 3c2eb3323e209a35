// Twins of csrc/cuda/async_copy.h.
#pragma once

#include "hardware.h"

namespace fuseblock {

template <int kBytes>
void copy_async_or_zero(void* shared, const void* global, uint32_t bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_emulator::check_shared(shared, kBytes, kBytes, "cp.async");
  if (bytes > kBytes) cuda_emulator::fail("cp.async: %u bytes of %d", bytes, kBytes);
  if (bytes > 0) {
    cuda_emulator::check_alignment(global, kBytes, "cp.async");
    cuda_emulator::check_memory(global, bytes);
  }
  cuda_emulator::copy_async(shared, global, bytes, kBytes - bytes);
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  copy_async_or_zero<kBytes>(shared, global, kBytes);
}

inline void copy_async_commit() { cuda_emulator::copy_async_commit(); }

template <int kGroups>
void copy_async_wait() {
  cuda_emulator::copy_async_wait(kGroups);
}

inline void copy_async_wait_all() { cuda_emulator::copy_async_wait_all(); }

}  // namespace fuseblock
