// Waiting for other threads, on the device.
#pragma once

namespace fuseblock {

// Tries after which a wait is taken for one that never ends: some minutes, since each of them sleeps for a while or goes to
// L2. The launch then fails, where a hanging GPU would tell nobody anything.
inline constexpr unsigned kSpinLimit = 1u << 29;

}  // namespace fuseblock

#define FB_SPIN_UNTIL(condition)                     \
  for (unsigned tries = 0; !(condition); ++tries)    \
    if (tries > ::fuseblock::kSpinLimit) __trap()
