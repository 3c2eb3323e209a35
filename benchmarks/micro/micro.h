// The C interface of the microbenchmarks: one function of this type for each kernel, `micro_<kernel>`.
#pragma once

#include <cstdint>

#include "cuda/placement.h"

// A kernel does its work `rounds` times over. What it leaves in `result` shows that it did.
struct MicroLaunch {
  int32_t blocks, threads, cluster, shared_bytes, rounds;
  int64_t bytes;
  const void* source;
  void* result;
  void* workspace;  // zero before the first launch; kernels leave their counters so
  int64_t* clocks;  // of each block: what the rounds took
  fuseblock::Residency* resident;  // if given, nothing runs: it is told how many blocks would at the same time
  void* stream;
};

using MicroFunction = int(const MicroLaunch*);  // a cudaError_t
