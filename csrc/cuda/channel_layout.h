// Where the channels of a tensor lie, as plain data. No CUDA here, so that any C++ can include it.
#pragma once

#include <cstdint>

namespace fuseblock {

// (samples, channels, size) contiguous, or channels-last, which is (samples, size, channels).
struct ChannelLayout {
  int64_t samples, channels, size;
  bool channels_last;

  // The launchers' own: blocks along the channels of a sample; how far a thread's visits are apart, in rows and columns of
  // visits, and in elements but for the ends of rows.
  int64_t chunks, row_step, column_step, step;
};

}  // namespace fuseblock
