// csrc/cuda/clock.h, emulated: a clock that goes forward and measures nothing.
#pragma once

#include <chrono>

namespace fuseblock {

inline long long clock_now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

}  // namespace fuseblock
