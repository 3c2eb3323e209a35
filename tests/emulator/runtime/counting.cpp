// See counting.h. Blocks of a launch must share one OS thread while they are counted: set_workers(1).
#include "counting.h"

#if defined(CUDA_EMULATOR_COUNTED)

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace cuda_emulator {
namespace {

struct Traffic {
  int64_t loaded, stored;            // bytes of all accesses
  int64_t loaded_once, stored_once;  // each byte at its first access in the launch
};

struct Watched {
  uintptr_t begin, end;
  std::vector<uint8_t> seen;  // bit 0: loaded by this launch, bit 1: stored
};

struct Launch {
  std::string launcher;
  std::vector<Traffic> traffic;  // of each watched range
};

std::vector<Watched> g_watched;
std::deque<Launch> g_launches;
size_t g_last = 0;  // where the last access was

void count(const void* p, size_t bytes, bool store) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const auto holds = [&](size_t n) { return at >= g_watched[n].begin && at < g_watched[n].end; };
  if (g_launches.empty() || g_watched.empty()) return;
  if (!holds(g_last)) {
    size_t n = 0;
    while (n < g_watched.size() && !holds(n)) ++n;
    if (n == g_watched.size()) return;
    g_last = n;
  }
  std::vector<Traffic>& all = g_launches.back().traffic;
  if (all.size() <= g_last) all.resize(g_last + 1);
  int64_t fresh = 0;
  const uint8_t bit = store ? 2 : 1;
  for (size_t n = 0; n < bytes; ++n) {
    uint8_t& seen = g_watched[g_last].seen[at - g_watched[g_last].begin + n];
    fresh += (seen & bit) == 0;
    seen |= bit;
  }
  (store ? all[g_last].stored : all[g_last].loaded) += bytes;
  (store ? all[g_last].stored_once : all[g_last].loaded_once) += fresh;
}

}  // namespace

void count_launch(const char* launcher) {
  for (Watched& range : g_watched) std::memset(range.seen.data(), 0, range.seen.size());
  g_launches.push_back({launcher, {}});
}
void count_load(const void* p, size_t bytes) { count(p, bytes, false); }
void count_store(const void* p, size_t bytes) { count(p, bytes, true); }

}  // namespace cuda_emulator

using namespace cuda_emulator;

// What tests/traffic.py calls.
extern "C" {

void counting_workers(int workers) { set_workers(workers); }
void counting_clear() {
  g_watched.clear();
  g_launches.clear();
  g_last = 0;
}
void counting_watch(uintptr_t begin, int64_t bytes) {
  g_watched.push_back({begin, begin + bytes, std::vector<uint8_t>(static_cast<size_t>(bytes) + 16)});
}
int64_t counting_launches() { return static_cast<int64_t>(g_launches.size()); }
const char* counting_launcher(int64_t launch) { return g_launches[launch].launcher.c_str(); }
void counting_traffic(int64_t launch, int64_t range, int64_t* out) {
  const std::vector<Traffic>& all = g_launches[launch].traffic;
  const Traffic traffic = range < static_cast<int64_t>(all.size()) ? all[range] : Traffic{};
  std::memcpy(out, &traffic, sizeof(traffic));
}

// ThreadSanitizer's interface, as far as g++ calls it for kernels.
#define ACCESS(bytes)                                                 \
  void __tsan_read##bytes(void* p) { count_load(p, bytes); }          \
  void __tsan_write##bytes(void* p) { count_store(p, bytes); }        \
  void __tsan_unaligned_read##bytes(void* p) { count_load(p, bytes); } \
  void __tsan_unaligned_write##bytes(void* p) { count_store(p, bytes); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { count_load(p, bytes); }
void __tsan_write_range(void* p, size_t bytes) { count_store(p, bytes); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int order) { __atomic_thread_fence(order); }

// Counters and the like: not the traffic of tensors.
#define ATOMIC(bits, T)                                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }     \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }     \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }   \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {             \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
  }                                                                                                           \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {               \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

}  // extern "C"

#endif
