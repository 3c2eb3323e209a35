// The emulator's scheduler: crews of blocks on OS threads, threads on fibers, barriers between them.
#include "counting.h"
#include "hardware.h"
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

namespace cuda_emulator {

thread_local const ThreadInfo* current = nullptr;

namespace {

constexpr uint64_t kCrewThreadLimit = 30000;  // each has two memory mappings; Linux gives a process 65530
// So many rounds in which threads did nothing but call __nanosleep() are taken for a wait that never ends.
constexpr int kIdleRounds = 10000;

std::atomic<unsigned> g_seed{0};
LaunchShape g_last_launch{};  // tests launch from one thread
std::atomic<int> g_workers{static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};

thread_local Crew* t_crew = nullptr;

void leave(bool forever) {
  Thread& thread = self();
  thread.fiber.leave(thread.owner->crew->scheduler, forever);
}

void fiber_main() {
  Fiber::entered(t_crew->scheduler);
  (*t_crew->grid->body)();
  Thread& thread = self();
  flush_stores(thread);
  release(&t_crew->order);
  if (thread.copies.first != TransferList::kNone) fail("a thread returns while its cp.async is under way");
  if (thread.bulk.first != TransferList::kNone) fail("a thread returns while its cp.async.bulk is under way");
  thread.done = true;
  if (--thread.owner->live == 0) {
    const std::string complaint = check_exit(*thread.owner);
    if (!complaint.empty()) fail("%s %s", describe(*thread.owner).c_str(), complaint.c_str());
  }
  leave(true);
  std::abort();
}

// Stacks are kept for the next crew of the same OS thread. A guard page below each stops overflows.
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

// On the heap, where AddressSanitizer has red zones, exactly `bytes` long; all bits set, which is NaN.
Memory poisoned(size_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max<size_t>(alignment, 16), std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

void make_threads(Block& block, StackPool& stacks) {
  const LaunchConfig& config = block.crew->grid->config;
  const dim3 size = config.block;
  const unsigned count = size.x * size.y * size.z;
  block.live = count;
  block.threads = std::vector<Thread>(count);
  block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
  for (unsigned n = 0; n < count; ++n) {
    Thread& thread = block.threads[n];
    thread.thread = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    thread.block = block.index;
    thread.block_size = size;
    thread.grid_size = config.grid;
    thread.lane = n % kWarp;
    thread.warp_lanes = std::min(kWarp, count - n / kWarp * kWarp);
    thread.cluster_rank = block.rank;
    thread.cluster_size = config.cluster;
    thread.warp = &block.warps[n / kWarp];
    thread.owner = &block;
    thread.fiber.prepare(stacks.get(block.crew->thread_count++), fiber_main);
  }
}

void make_block(Crew& crew, int number, StackPool& stacks) {
  const LaunchConfig& config = crew.grid->config;
  const unsigned n = static_cast<unsigned>(number);
  Block& block = *crew.blocks.emplace_back(std::make_unique<Block>());
  block.crew = &crew;
  block.index = {n % config.grid.x, n / config.grid.x % config.grid.y, n / (config.grid.x * config.grid.y)};
  block.rank = n % config.cluster;
  block.cluster = &crew.clusters[(crew.blocks.size() - 1) / config.cluster];
  block.cluster->blocks.push_back(&block);
  block.shared.reserve(kSharedArrayLimit);
  block.mbarriers.reserve(kMBarrierLimit);
  block.bulk_sources.reserve(kBulkSourceLimit);
  if (config.shared_bytes > 0) {
    block.shared.push_back({nullptr, config.shared_bytes, 128, poisoned(config.shared_bytes, 128)});
  }
  make_threads(block, stacks);
}

void report_deadlock(const Crew& crew) {
  for (const auto& block : crew.blocks) {
    if (block->live == 0) continue;
    const Thread* waits = nullptr;
    for (const Thread& thread : block->threads) {
      if (!thread.done && (waits == nullptr || thread.wait.kind > waits->wait.kind)) waits = &thread;
    }
    size_t same = 0;
    for (const Thread& thread : block->threads) {
      same += !thread.done && thread.wait.kind == waits->wait.kind && thread.wait.what == waits->wait.what;
    }
    char text[400];
    const char* const name = waits->wait.operation;
    if (waits->wait.kind == Wait::kBarrier) {
      std::snprintf(text, sizeof(text), "%s was not reached by all threads (%zu of %zu wait)", name, same,
                    block->threads.size());
    } else if (waits->wait.kind == Wait::kMBarrier) {
      std::snprintf(text, sizeof(text), "%zu threads wait for %s", same,
                    describe(*static_cast<const MBarrier*>(waits->wait.what)).c_str());
    } else if (waits->wait.kind == Wait::kCounter) {
      std::snprintf(text, sizeof(text), "%zu threads wait for a counter to reach %u; it is %u", same,
                    static_cast<unsigned>(waits->wait.value), *static_cast<const unsigned*>(waits->wait.what));
    } else {
      std::snprintf(text, sizeof(text), "%zu threads do nothing but sleep", same);
    }
    return crew.grid->fail("deadlock in " + describe(*block) + ": " + text);
  }
}

// What has happened while threads had their turns.
struct Round {
  bool progress = false;   // a thread did more than to yield
  bool spinning = false;   // a thread yielded
  bool held_back = false;  // a warp of a slow block had no turn
};

template <class T>
void shuffle(Crew& crew, std::vector<T>& items) {
  for (size_t n = items.size(); n > 1; --n) std::swap(items[n - 1], items[crew.random(static_cast<uint32_t>(n))]);
}

// The threads of one warp, in the order of their last turn.
using WarpThreads = std::vector<Thread*>;

// Every thread of the warp that can has a turn, and another one until the warp waits or chance ends it: a warp that stays
// in the cache is several times as fast.
void run_warp(Crew& crew, WarpThreads& warp, Round& round, size_t& live) {
  uint32_t turns = g_seed == 0 ? ~0u : 1 + crew.random(32);
  for (bool progress = true; progress && turns > 0; --turns) {
    progress = false;
    if (g_seed != 0) shuffle(crew, warp);
    for (Thread* thread : warp) {
      if (!thread->runnable()) continue;
      thread->yielded = false;
      current = thread;
      thread->fiber.resume(crew.scheduler);
      current = nullptr;
      (thread->yielded ? round.spinning : progress) = true;
      live -= thread->done;
      if (crew.grid->failed) return;
    }
    round.progress |= progress;
  }
}

// Every warp has its turn, in an order that chance decides.
Round run_round(Crew& crew, std::vector<WarpThreads>& warps, bool slow_blocks_too, size_t& live) {
  Round round;
  if (g_seed != 0) shuffle(crew, warps);
  for (WarpThreads& warp : warps) {
    if (std::none_of(warp.begin(), warp.end(), [](const Thread* thread) { return thread->runnable(); })) continue;
    if (warp.front()->owner->slow && !slow_blocks_too && crew.random(16) != 0) {
      round.held_back = true;
      continue;
    }
    run_warp(crew, warp, round, live);
    if (crew.grid->failed) break;
    if (crew.random(4) == 0) crew.deliver_some(false);
  }
  return round;
}

void run_crew(Grid& grid, int first, int count, StackPool& stacks) {
  Crew crew;
  crew.grid = &grid;
  t_crew = &crew;
  const unsigned seed = g_seed;
  crew.random = Random(seed * 1000003ull + static_cast<unsigned>(first));
  crew.clusters = std::vector<Cluster>((count + grid.config.cluster - 1) / grid.config.cluster);
  crew.transfers = transfer_pool();
  for (int n = first; n < first + count; ++n) make_block(crew, n, stacks);
  if (seed != 0) {
    crew.arrival = static_cast<Arrival>(crew.random(3));
    if (count > 1 && crew.random(2) == 0) crew.blocks[crew.random(static_cast<uint32_t>(count))]->slow = true;
  }
  std::vector<WarpThreads> warps;
  for (auto& block : crew.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.lane == 0) warps.emplace_back();
      warps.back().push_back(&thread);
    }
  }

  size_t live = crew.thread_count;
  bool slow_blocks_too = false;
  for (int idle = 0; live > 0 && !grid.failed;) {
    crew.deliver_some(false);
    const Round round = run_round(crew, warps, slow_blocks_too, live);
    slow_blocks_too = false;
    if (round.progress) {
      idle = 0;
    } else if (round.held_back) {
      slow_blocks_too = true;
    } else if (crew.transfers->under_way() > 0) {
      crew.deliver_some(true);
    } else if (!round.spinning || ++idle > kIdleRounds) {
      report_deadlock(crew);
    }
  }
  acquire(&crew.order);
  for (const WarpThreads& warp : warps) {
    for (Thread* thread : warp) thread->fiber.destroy();
  }
  t_crew = nullptr;
}

}  // namespace

void FreeMemory::operator()(void* p) const { std::free(p); }

bool Wait::is_over() const {
  switch (kind) {
    case kBarrier: return static_cast<const Barrier*>(what)->generation != value;
    case kMBarrier: return static_cast<const MBarrier*>(what)->phase != value;
    case kCounter:
      return static_cast<int>(__atomic_load_n(static_cast<const unsigned*>(what), __ATOMIC_ACQUIRE) -
                              static_cast<unsigned>(value)) >= 0;
    default: return true;
  }
}

void Grid::fail(const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!failed) message = why;
  failed = true;
}

Thread& self() { return *const_cast<Thread*>(static_cast<const Thread*>(current)); }

std::string describe(const Block& block) {
  char text[64];
  std::snprintf(text, sizeof(text), "block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
  return text;
}

void wait_for(const Wait& wait) {
  Thread& thread = self();
  thread.wait = wait;
  leave(false);
  thread.wait = {};
}

bool arrive_at(Barrier& barrier, unsigned needed) {
  release(&barrier);
  if (++barrier.arrived < needed) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

void wait_at(Barrier& barrier, unsigned needed, const char* operation) {
  flush_stores(self());
  const uint64_t generation = barrier.generation;
  if (!arrive_at(barrier, needed)) wait_for({Wait::kBarrier, &barrier, generation, operation});
  acquire(&barrier);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  self().owner->crew->grid->fail(text);
  leave(true);
  std::abort();
}

void complain(Crew& crew, const std::string& what) {
  if (current != nullptr) fail("%s", what.c_str());
  crew.grid->fail(what);
}

void block_barrier() {
  Block& block = *self().owner;
  wait_at(block.barrier, static_cast<unsigned>(block.threads.size()), "__syncthreads");
}

void named_barrier(unsigned id, unsigned threads, bool wait) {
  Block& block = *self().owner;
  if (id == 0 || id > 15) fail("barrier.sync: there is no named barrier %u", id);
  if (threads == 0 || threads % kWarp != 0 || threads > block.threads.size()) {
    fail("barrier.sync: %u threads of %zu", threads, block.threads.size());
  }
  Barrier& barrier = block.named[id];
  if (barrier.arrived > 0 && barrier.mask != threads) {
    fail("barrier.sync: named barrier %u is for %u threads and for %u", id, barrier.mask, threads);
  }
  barrier.mask = threads;
  if (wait) return wait_at(barrier, threads, "barrier.sync");
  flush_stores(self());
  arrive_at(barrier, threads);
}

void warp_collective(unsigned mask, const char* operation, void* mine, Perform perform) {
  Thread& thread = self();
  // A full mask in a warp that the block does not fill means the lanes that there are.
  const unsigned present = mask & (thread.warp_lanes == kWarp ? ~0u : (1u << thread.warp_lanes) - 1);
  if ((mask >> thread.lane & 1) == 0) fail("%s: lane %u is not in its own mask 0x%08x", operation, thread.lane, mask);
  Barrier& barrier = thread.warp->barrier(mask);
  if (barrier.arrived == 0) barrier.operation = operation;
  if (barrier.operation != operation && std::strcmp(barrier.operation, operation) != 0) {
    fail("%s and %s meet: the threads of a warp have diverged", barrier.operation, operation);
  }
  flush_stores(thread);
  thread.warp->arguments[thread.lane] = mine;
  if (barrier.arrived + 1 == static_cast<unsigned>(__builtin_popcount(present)) && perform != nullptr) {
    acquire(&barrier);
    perform(thread.warp->arguments, present);
  }
  wait_at(barrier, static_cast<unsigned>(__builtin_popcount(present)), operation);
}

void warp_barrier(unsigned mask, const char* operation) { warp_collective(mask, operation, nullptr, nullptr); }

void grid_barrier() {
  Crew& crew = *self().owner->crew;
  if (!crew.grid->config.cooperative) fail("grid.sync() in a launch that is not cooperative");
  wait_at(crew.grid_barrier, static_cast<unsigned>(crew.thread_count), "grid.sync()");
}

void wait_for_count(const unsigned* counter, unsigned target) {
  flush_stores(self());
  const Wait wait{Wait::kCounter, counter, target, "a counter"};
  if (!wait.is_over()) wait_for(wait);
}

void memory_fence() { flush_stores(self()); }

void yield() {
  self().yielded = true;
  leave(false);
}

void* dynamic_shared() {
  Block& block = *self().owner;
  return block.crew->grid->config.shared_bytes == 0 ? nullptr : block.shared.front().memory.get();
}

SharedArray& Block::static_array(const void* key, size_t bytes, size_t alignment) {
  for (SharedArray& array : shared) {
    if (array.key == key) {
      acquire(array.memory.get());
      return array;
    }
  }
  const size_t dynamic_bytes = crew->grid->config.shared_bytes;
  const size_t limit = shared_memory_limit();
  if (shared.size() == kSharedArrayLimit) fail("more than %zu shared arrays", kSharedArrayLimit);
  static_bytes += bytes;
  if (static_bytes > kStaticSharedLimit || static_bytes + dynamic_bytes > limit) {
    fail("too much shared memory: %zu bytes, %zu of them static", static_bytes + dynamic_bytes, static_bytes);
  }
  SharedArray& made = shared.emplace_back(SharedArray{key, bytes, alignment, poisoned(bytes, alignment)});
  release(made.memory.get());
  return made;
}

SharedArray* Block::find(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (SharedArray& array : shared) {
    const char* start = static_cast<const char*>(array.memory.get());
    if (at >= start && at + bytes <= start + array.bytes) return &array;
  }
  return nullptr;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  return self().owner->static_array(key, bytes, alignment).memory.get();
}

void launch(const LaunchConfig& config, const std::function<void()>& thread) {
  const uint64_t threads = 1ull * config.block.x * config.block.y * config.block.z;
  const uint64_t blocks = 1ull * config.grid.x * config.grid.y * config.grid.z;
  if (blocks == 0 || blocks > INT32_MAX || config.grid.y > 65535 || config.grid.z > 65535 || threads == 0 ||
      threads > 1024 || config.shared_bytes > shared_memory_limit() || config.cluster == 0 ||
      config.grid.x % config.cluster != 0) {
    throw std::runtime_error("cuda emulator: invalid launch configuration");
  }
  if (config.shared_bytes > kStaticSharedLimit && !config.much_shared) {
    throw std::runtime_error("cuda emulator: FB_LAUNCH with more than 48 KB of shared memory");
  }
  const uint64_t crew = config.cooperative ? blocks : config.cluster;
  if (crew * threads > kCrewThreadLimit) throw std::runtime_error("cuda emulator: too many threads at the same time");
  g_last_launch = {config.grid, config.block};
  count_launch(thread.target_type().name());
  Grid grid{config, &thread, static_cast<int>(blocks)};
  const int crews = static_cast<int>(blocks / crew);
  std::atomic<int> next{0};
  const auto work = [&] {
    static thread_local StackPool stacks;
    for (int n; !grid.failed && (n = next++) < crews;) {
      run_crew(grid, n * static_cast<int>(crew), static_cast<int>(crew), stacks);
    }
  };
  const int workers = std::min<int>(g_workers, crews);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> team;
    for (int n = 0; n < workers; ++n) team.emplace_back(work);
    for (std::thread& worker : team) worker.join();
  }
  if (grid.failed) throw std::runtime_error("cuda emulator: " + grid.message);
}

LaunchShape last_launch() { return g_last_launch; }

void set_seed(unsigned seed) { g_seed = seed; }

void set_workers(int workers) { g_workers = std::max(1, workers); }

}  // namespace cuda_emulator
