// The GPU that launchers are told they run on: limits, so that what happens on a smaller one can be tested.
#pragma once

#include <cstddef>

namespace cuda_emulator {

// An H200, unless told otherwise. Registers are not counted.
struct Device {
  bool clusters = true;
  bool cooperative = true;
  int multiprocessors = 132;
  int neighbours = 16;           // multiprocessors that can host one cluster
  unsigned largest_cluster = 16;
  size_t shared_bytes = 227 << 10;  // that a block may have; a multiprocessor has 1 KB more, and a block takes 1 KB more
  unsigned threads = 2048;          // of a multiprocessor
};

void set_device(const Device& device);
const Device& device();

}  // namespace cuda_emulator
