#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <thread>

#include "barrier.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fuseblock::cpu {

namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done(); gives the CPU away between looks once the wait has become long.
template <class Done>
void spin_until(Done&& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < 256) relax();
    else sched_yield();
  }
}

// Who came to a meeting of n threads, and what was decided.
struct Meeting {
  enum State : int { open, held, cancelled };
  int64_t n;
  void (*work)(int64_t, void*);
  void* context;
  alignas(64) std::atomic<int64_t> arrived{0};
  std::atomic<int> state{open};

  bool decide(State s) {
    int expected = open;
    return state.compare_exchange_strong(expected, s);
  }

  void attend(int64_t begin, int64_t end) {
    if (end - begin > 1) {  // one thread got several seats: the others will never fill up
      decide(cancelled);
      return;
    }
    if (arrived.fetch_add(1) + 1 == n) decide(held);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    spin_until([&] {
      if (state.load() != open) return true;
      if (std::chrono::steady_clock::now() > deadline) decide(cancelled);
      return false;
    });
    if (state.load() == held) work(begin, context);
  }
};

}  // namespace

void barrier_wait(Barrier* b) {
  const uint64_t phase = b->phase.load(std::memory_order_relaxed);
  if (b->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == b->members) {
    b->arrived.store(0, std::memory_order_relaxed);
    b->phase.store(phase + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return b->phase.load(std::memory_order_acquire) != phase; });
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

int64_t available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? n : 1;
}

bool run_together(const Threads& threads, int64_t n, void (*work)(int64_t, void*), void* context) {
  Meeting meeting{n, work, context};
  parallel_for(threads, n, 1, [&](int64_t begin, int64_t end) { meeting.attend(begin, end); });
  return meeting.state.load() == Meeting::held;
}

#if defined(__x86_64__)
FlushSubnormals::FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr((unsigned)saved_ | 0x8040); }
FlushSubnormals::~FlushSubnormals() { _mm_setcsr((unsigned)saved_); }
#elif defined(__aarch64__)
FlushSubnormals::FlushSubnormals() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
}
FlushSubnormals::~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
FlushSubnormals::FlushSubnormals() : saved_(0) {}
FlushSubnormals::~FlushSubnormals() {}
#endif

}  // namespace fuseblock::cpu
