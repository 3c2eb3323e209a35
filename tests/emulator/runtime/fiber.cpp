#include "fiber.h"

#include <cstdint>

extern "C" {
#if defined(CUDA_EMULATOR_TSAN)
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber(void);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
#endif
#if defined(CUDA_EMULATOR_ASAN)
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
#endif
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, stores the stack pointer, takes the other and returns there.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");
#endif

namespace cuda_emulator {
namespace {

#if defined(CUDA_EMULATOR_TSAN)
// Switching itself must not order memory: only barriers do, or no missing barrier would ever be found.
constexpr unsigned kNoSync = 1;
#endif

}  // namespace

SchedulerContext::SchedulerContext() {
#if defined(CUDA_EMULATOR_TSAN)
  tsan_fiber = __tsan_get_current_fiber();
#endif
}

void Fiber::prepare(char* stack, void (*entry)()) {
  stack_ = stack;
  asan_fake_stack_ = nullptr;
#if defined(__x86_64__)
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(15));
  *--top = nullptr;  // keeps the stack pointer at 8 modulo 16 on entry, as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int n = 0; n < kSavedRegisters; ++n) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

void Fiber::destroy() {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_destroy_fiber(tsan_fiber_);
#endif
}

void Fiber::resume(SchedulerContext& scheduler) {
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.asan_fake_stack, stack_, kStackBytes);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(tsan_fiber_, kNoSync);
#endif
#if defined(__x86_64__)
  cuda_emulator_switch(&scheduler.stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler.context, &context_);
#endif
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.asan_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave(SchedulerContext& scheduler, [[maybe_unused]] bool forever) {
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(forever ? nullptr : &asan_fake_stack_, scheduler.stack_bottom, scheduler.stack_bytes);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan_fiber, kNoSync);
#endif
#if defined(__x86_64__)
  cuda_emulator_switch(&stack_pointer_, scheduler.stack_pointer);
#else
  swapcontext(&context_, &scheduler.context);
#endif
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(asan_fake_stack_, &scheduler.stack_bottom, &scheduler.stack_bytes);
#endif
}

void Fiber::entered([[maybe_unused]] SchedulerContext& scheduler) {
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
#endif
}

void as_copy_engine(void (*work)(void*), void* argument) {
#if defined(CUDA_EMULATOR_TSAN)
  // Several take turns: what one has seen before orders fewer of its copies by accident.
  constexpr int kEngines = 16;
  static thread_local void* engines[kEngines] = {};
  static thread_local int next = 0;
  void*& engine = engines[next++ % kEngines];
  if (engine == nullptr) engine = __tsan_create_fiber(0);
  void* const caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(engine, kNoSync);
  work(argument);
  __tsan_switch_to_fiber(caller, kNoSync);
#else
  work(argument);
#endif
}

void release([[maybe_unused]] void* address) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_release(address);
#endif
}

void acquire([[maybe_unused]] void* address) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_acquire(address);
#endif
}

}  // namespace cuda_emulator
