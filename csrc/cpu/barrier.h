// A reusable barrier that spins, and yields its CPU when a member is late.
#pragma once

#include <atomic>
#include <cstdint>

namespace fuseblock::cpu {

struct Barrier {
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<uint64_t> phase{0};
  int64_t members = 1;
};

}  // namespace fuseblock::cpu
