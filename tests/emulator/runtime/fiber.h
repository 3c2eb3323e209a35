// A fiber: a stack of its own and the two switches into and out of it. Knows the sanitizers, which must be told.
//
// Compile the runtime without -fsanitize and with CUDA_EMULATOR_ASAN or CUDA_EMULATOR_TSAN instead: it plays the part of
// the hardware, so its own bookkeeping must be invisible to the tools that watch the kernels.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_emulator {

inline constexpr size_t kStackBytes = 256 << 10;

// Where the scheduler stands while a fiber runs. One per block in flight; used by one OS thread only.
struct SchedulerContext {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;

  SchedulerContext();
};

class Fiber {
 public:
  // entry runs on `stack` (kStackBytes long) at the first resume. It must end by leave(scheduler, true).
  void prepare(char* stack, void (*entry)());
  void destroy();

  // Called by the scheduler: run the fiber until it leaves.
  void resume(SchedulerContext& scheduler);
  // Called on the fiber: back to the scheduler. `forever`: the fiber is never resumed.
  void leave(SchedulerContext& scheduler, bool forever);
  // Called first thing on the fiber.
  static void entered(SchedulerContext& scheduler);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
  void* asan_fake_stack_ = nullptr;
};

// Calls work(argument). For ThreadSanitizer somebody else does it, whom only happens-before edges order: a copy engine.
void as_copy_engine(void (*work)(void*), void* argument);

// Happens-before edges for ThreadSanitizer: what precedes release(x) is visible after acquire(x). Else nothing.
void release(void* address);
void acquire(void* address);

}  // namespace cuda_emulator
