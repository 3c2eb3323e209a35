// The emulator's hardware: blocks on OS threads, threads on fibers, barriers between them.
#include "cuda_emulator.h"
// The scheduler's own structures use these names.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"

namespace cuda_emulator {

thread_local const ThreadInfo* current = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStaticSharedLimit = 48 << 10;
constexpr size_t kSharedLimit = 227 << 10;
constexpr int kCooperativeBlockLimit = 256;
constexpr size_t kSharedArrayLimit = 64;

std::atomic<unsigned> g_seed{0};
LaunchShape g_last_launch{};  // tests launch from one thread
std::atomic<int> g_workers{static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};

struct Barrier {
  unsigned mask = 0;  // of the lanes that meet, in a warp
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
};

// Nothing here allocates memory while threads run: ThreadSanitizer watches the heap.
struct Warp {
  // Disjoint groups of a warp may be in different collectives. Each lane waits at one barrier at most.
  Barrier barriers[kWarp];
  alignas(16) unsigned char slots[kWarp][kLaneSlotBytes];

  Barrier& barrier(unsigned mask) {
    Barrier* found = nullptr;
    for (Barrier& barrier : barriers) {
      if (barrier.mask == mask) return barrier;
      if (barrier.arrived == 0) found = &barrier;
    }
    found->mask = mask;
    return *found;
  }
};

struct Block;

struct Thread : ThreadInfo {
  Fiber fiber;
  Block* owner = nullptr;
  Warp* warp = nullptr;
  Barrier* waits_for = nullptr;  // and does not run before its generation leaves `generation`
  uint64_t generation = 0;
  bool waits_for_grid = false;
  bool done = false;

  bool runnable() const {
    return !done && !waits_for_grid && (waits_for == nullptr || waits_for->generation != generation);
  }
};

struct Grid {
  dim3 size, block_size;
  size_t shared_bytes;
  bool cooperative;
  const std::function<void()>* body;
  int blocks;

  std::mutex mutex{};
  std::condition_variable changed{};
  int arrived = 0;
  uint64_t generation = 0;
  std::atomic<bool> failed{false};
  std::string message{};
  char order = 0;  // address for happens-before edges of grid barriers

  void fail(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!failed) message = why;
    failed = true;
    changed.notify_all();
  }
};

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

// On the heap, where AddressSanitizer has red zones, exactly `bytes` long; all bits set, which is NaN.
Memory poisoned(size_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max<size_t>(alignment, 16), std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

struct SharedArray {
  const void* key;
  Memory memory;
};

struct Block {
  Grid* grid = nullptr;
  SchedulerContext scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  Memory dynamic;
  std::vector<SharedArray> shared;
  size_t shared_bytes = 0;
  char order = 0;  // address for the happens-before edge from the threads' ends to the block's
};

thread_local Block* t_block = nullptr;

Thread& self() { return *const_cast<Thread*>(static_cast<const Thread*>(current)); }

void leave(bool forever) {
  Thread& thread = self();
  thread.fiber.leave(thread.owner->scheduler, forever);
}

void fiber_main() {
  Fiber::entered(t_block->scheduler);
  (*t_block->grid->body)();
  release(&t_block->order);
  self().done = true;
  leave(true);
  std::abort();
}

void wait_at(Barrier& barrier, unsigned needed, const char* operation) {
  if (barrier.arrived == 0) barrier.operation = operation;
  if (std::strcmp(barrier.operation, operation) != 0) {
    fail("%s and %s meet: the threads of a warp have diverged", barrier.operation, operation);
  }
  Thread& thread = self();
  const uint64_t generation = barrier.generation;
  release(&barrier);
  if (++barrier.arrived == needed) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    thread.waits_for = &barrier;
    thread.generation = generation;
    leave(false);
    thread.waits_for = nullptr;
  }
  acquire(&barrier);
}

// Stacks are kept for the next block of the same OS thread. A guard page below each stops overflows.
class StackPool {
 public:
  ~StackPool() {
    for (char* stack : stacks_) munmap(stack - kGuardBytes, kGuardBytes + kStackBytes);
  }
  char* get(size_t index) {
    while (stacks_.size() <= index) {
      void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, kGuardBytes, PROT_NONE);
      stacks_.push_back(static_cast<char*>(p) + kGuardBytes);
    }
    return stacks_[index];
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  std::vector<char*> stacks_;
};

void make_threads(Block& block, uint3 index, StackPool& stacks) {
  const dim3 size = block.grid->block_size;
  const unsigned count = size.x * size.y * size.z;
  block.threads = std::vector<Thread>(count);
  block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
  for (unsigned n = 0; n < count; ++n) {
    Thread& thread = block.threads[n];
    thread.thread = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    thread.block = index;
    thread.block_size = size;
    thread.grid_size = block.grid->size;
    thread.lane = n % kWarp;
    thread.warp_lanes = std::min(kWarp, count - n / kWarp * kWarp);
    thread.warp = &block.warps[n / kWarp];
    thread.owner = &block;
    thread.fiber.prepare(stacks.get(n), fiber_main);
  }
}

// All live threads of a block stand at grid.sync(): waits for the other blocks. False if the launch failed meanwhile.
bool pass_grid_barrier(Block& block) {
  Grid& grid = *block.grid;
  std::unique_lock<std::mutex> lock(grid.mutex);
  const uint64_t generation = grid.generation;
  if (++grid.arrived == grid.blocks) {
    grid.arrived = 0;
    ++grid.generation;
    grid.changed.notify_all();
  } else {
    grid.changed.wait(lock, [&] { return grid.generation != generation || grid.failed; });
  }
  for (Thread& thread : block.threads) thread.waits_for_grid = false;
  return !grid.failed;
}

void report_deadlock(const Block& block, uint3 index) {
  size_t live = 0, at_grid = 0;
  const char* operation = "";
  for (const Thread& thread : block.threads) {
    live += !thread.done;
    at_grid += thread.waits_for_grid;
    if (thread.waits_for != nullptr) operation = thread.waits_for->operation;
  }
  if (at_grid > 0 && !block.grid->cooperative) return block.grid->fail("grid.sync() in a launch that is not cooperative");
  if (at_grid > 0) operation = "grid.sync()";
  char text[256];
  std::snprintf(text, sizeof(text), "deadlock in block (%u, %u, %u): %s was not reached by all threads (%zu of %zu wait)",
                index.x, index.y, index.z, operation, live, block.threads.size());
  block.grid->fail(text);
}

void run_block(Grid& grid, uint3 index, StackPool& stacks) {
  Block block;
  block.grid = &grid;
  block.shared_bytes = grid.shared_bytes;
  block.shared.reserve(kSharedArrayLimit);
  t_block = &block;
  if (grid.shared_bytes > 0) block.dynamic = poisoned(grid.shared_bytes, 128);
  make_threads(block, index, stacks);
  std::vector<size_t> order(block.threads.size());
  std::iota(order.begin(), order.end(), 0);
  const unsigned seed = g_seed;
  std::mt19937 random(seed * 2654435761u + index.x + 7919 * index.y + 104729 * index.z);

  size_t live = order.size();
  while (live > 0 && !grid.failed) {
    bool progress = false;
    size_t at_grid = 0;
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (const size_t n : order) {
      Thread& thread = block.threads[n];
      at_grid += thread.waits_for_grid;
      if (!thread.runnable()) continue;
      current = &thread;
      thread.fiber.resume(block.scheduler);
      current = nullptr;
      progress = true;
      live -= thread.done;
      if (grid.failed) break;
    }
    if (progress) continue;
    if (at_grid != block.threads.size() || !grid.cooperative) {
      report_deadlock(block, index);
    } else if (!pass_grid_barrier(block)) {
      break;
    }
  }
  acquire(&block.order);
  for (Thread& thread : block.threads) thread.fiber.destroy();
  t_block = nullptr;
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  self().owner->grid->fail(text);
  leave(true);
  std::abort();
}

void block_barrier() {
  Block& block = *self().owner;
  wait_at(block.barrier, static_cast<unsigned>(block.threads.size()), "__syncthreads");
}

void warp_barrier(unsigned mask, const char* operation) {
  Thread& thread = self();
  // A full mask in a warp that the block does not fill means the lanes that there are.
  const unsigned existing = thread.warp_lanes == kWarp ? ~0u : (1u << thread.warp_lanes) - 1;
  if ((mask >> thread.lane & 1) == 0) fail("%s: lane %u is not in its own mask 0x%08x", operation, thread.lane, mask);
  wait_at(thread.warp->barrier(mask), static_cast<unsigned>(__builtin_popcount(mask & existing)), operation);
}

void grid_barrier() {
  Thread& thread = self();
  Grid& grid = *thread.owner->grid;
  release(&grid.order);
  thread.waits_for_grid = true;
  leave(false);
  acquire(&grid.order);
}

void yield() { leave(false); }

void* lane_slot(unsigned lane) { return self().warp->slots[lane]; }

void* dynamic_shared() { return self().owner->dynamic.get(); }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Block& block = *self().owner;
  for (SharedArray& array : block.shared) {
    if (array.key == key) {
      acquire(array.memory.get());
      return array.memory.get();
    }
  }
  if (block.shared.size() == kSharedArrayLimit) fail("more than %zu shared arrays", kSharedArrayLimit);
  block.shared_bytes += bytes;
  if (block.shared_bytes - block.grid->shared_bytes > kStaticSharedLimit || block.shared_bytes > kSharedLimit) {
    fail("too much shared memory: %zu bytes, %zu of them static", block.shared_bytes,
         block.shared_bytes - block.grid->shared_bytes);
  }
  void* memory = block.shared.emplace_back(SharedArray{key, poisoned(bytes, alignment)}).memory.get();
  release(memory);
  return memory;
}

void launch(dim3 size, dim3 block_size, size_t shared_bytes, bool cooperative, const std::function<void()>& thread) {
  const uint64_t threads = 1ull * block_size.x * block_size.y * block_size.z;
  const uint64_t blocks = 1ull * size.x * size.y * size.z;
  if (blocks == 0 || blocks > INT32_MAX || size.y > 65535 || size.z > 65535 || threads == 0 || threads > 1024 ||
      shared_bytes > kSharedLimit || (cooperative && blocks > kCooperativeBlockLimit)) {
    throw std::runtime_error("cuda emulator: invalid launch configuration");
  }
  g_last_launch = {size, block_size};
  Grid grid{size, block_size, shared_bytes, cooperative, &thread, static_cast<int>(blocks)};
  std::atomic<int> next{0};
  const auto work = [&] {
    static thread_local StackPool stacks;
    for (int n; !grid.failed && (n = next++) < grid.blocks;) {
      const unsigned index = static_cast<unsigned>(n);
      run_block(grid, {index % size.x, index / size.x % size.y, index / (size.x * size.y)}, stacks);
    }
  };
  const int workers = cooperative ? grid.blocks : std::min<int>(g_workers, grid.blocks);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> crew;
    for (int n = 0; n < workers; ++n) crew.emplace_back(work);
    for (std::thread& worker : crew) worker.join();
  }
  if (grid.failed) throw std::runtime_error("cuda emulator: " + grid.message);
}

LaunchShape last_launch() { return g_last_launch; }

void set_seed(unsigned seed) { g_seed = seed; }

void set_workers(int workers) { g_workers = std::max(1, workers); }

}  // namespace cuda_emulator

// Launches throw, so there never is an error to fetch; what the launchers call instead of the CUDA runtime's.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
