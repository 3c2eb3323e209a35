// Threads that work on one problem at the same time: a spinning barrier, and the check that they are really there.
#pragma once

#include <cstdint>

#include "threads.h"

namespace fuseblock::cpu {

struct Barrier;

// How many CPUs this process may run on; more spinning threads than that would only wait for each other.
int64_t available_cpus();

// Whether this process was forked after this library was loaded. OpenMP pools do not survive a fork (a parallel region of
// the child waits for threads that only the parent has), so kernels then stay on the calling thread.
bool in_forked_child();

// Runs work(j) for all j < n at the same time, each on its own thread; work may then use barriers. If the pool does not
// bring n threads together soon (nested region, smaller pool), nothing of it runs and the result is false.
bool run_together(const Threads&, int64_t n, void (*work)(int64_t j, void* context), void* context);

// Subnormal floats count as zero while this lives: gradients that fade over a long sequence would otherwise slow every
// multiply-add that they meet a hundredfold.
class FlushSubnormals {
 public:
  FlushSubnormals();
  ~FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace fuseblock::cpu
