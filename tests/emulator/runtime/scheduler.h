// What the emulated hardware consists of; internal to the runtime.
//
// A crew is a set of blocks that run at the same time, on one OS thread: one block of an ordinary launch, one cluster, or
// the whole grid of a cooperative launch. Its threads take turns, so a seed decides everything that happens in it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_emulator.h"
// The structures below use these names.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include "fiber.h"

namespace cuda_emulator {

inline constexpr unsigned kWarp = 32;
inline constexpr size_t kStaticSharedLimit = 48 << 10;
inline constexpr size_t kSharedArrayLimit = 64;
inline constexpr size_t kMBarrierLimit = 128;
inline constexpr size_t kBulkSourceLimit = 256;

struct Block;
struct Crew;
struct Thread;

struct Barrier {
  unsigned mask = 0;  // of the lanes that meet, in a warp; how many threads meet, at a named barrier
  unsigned arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
};

// Nothing here allocates memory while threads run: ThreadSanitizer watches the heap.
struct Warp {
  // Disjoint groups of a warp may be in different collectives. Each lane waits at one barrier at most.
  Barrier barriers[kWarp];
  void* arguments[kWarp];  // of the lanes in a collective

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

// The state behind the opaque 8 bytes of an mbarrier, which themselves only hold a mark that nothing may overwrite.
struct MBarrier {
  void* address;
  Block* owner;
  unsigned arrivals, pending;  // expected in each phase; still missing in this one
  int64_t bytes;               // expected and not yet arrived; negative while arrivals are ahead of what is expected
  uint64_t phase;
  bool valid;
  const Thread* unfenced;  // the thread that initialised it and has not called fence.mbarrier_init since, or null
};

// Why a thread does not run.
struct Wait {
  enum Kind { kNothing, kBarrier, kMBarrier, kCounter };
  Kind kind = kNothing;
  const void* what = nullptr;
  uint64_t value = 0;  // generation, phase or count that must be passed or reached
  const char* operation = "";

  bool is_over() const;
};

// An asynchronous copy or a remote store that has not arrived yet. Source and destination are touched when it arrives.
struct Transfer {
  const char* operation;
  void* destination = nullptr;
  const void* source = nullptr;  // null: `value`
  unsigned char value[16] = {};
  uint32_t bytes, zeros = 0;              // zeros follow the bytes
  Block *from = nullptr, *to = nullptr;   // whose shared memory is read and written, or null
  MBarrier* completes = nullptr;          // told of the bytes that have arrived, or null
  bool arrival = false;                   // no bytes: a thread's arrival at `completes`
  Thread* stores_of = nullptr;            // whose stores arrive in order of issue, or null
  uint64_t group = 0;                     // of its thread's copies
  uint32_t position = 0;                  // in the pool's list of what is under way
  uint32_t next = 0;                      // of the same thread and kind, or of the unused
  bool owned = false;                     // by a list of its thread, which gives it back
  bool arrived = false;
};

// Transfers by number; one pool per OS thread, so that no memory is allocated while threads run.
class TransferPool {
 public:
  static constexpr uint32_t kSize = 1 << 16;
  TransferPool();
  ~TransferPool();
  TransferPool(const TransferPool&) = delete;

  void clear();
  bool full() const { return unused_ == kNone && fresh_ == kSize; }
  Transfer& operator[](uint32_t number) { return transfers_[number]; }
  // A number whose transfer is under way from now on.
  uint32_t take();
  // It has arrived.
  void arrived(uint32_t number);
  void give_back(uint32_t number);

  uint32_t under_way() const { return count_; }
  uint32_t number(uint32_t position) const { return numbers_[position]; }

 private:
  static constexpr uint32_t kNone = ~0u;
  Transfer* transfers_;
  uint32_t* numbers_;  // of those under way, in no order
  uint32_t count_ = 0, fresh_ = 0, unused_ = kNone;
};

// Transfers of one thread in the order of issue, by their numbers in the pool.
struct TransferList {
  static constexpr uint32_t kNone = ~0u;
  uint32_t first = kNone, last = kNone;
  uint64_t group = 0;  // that is being filled
};

struct Thread : ThreadInfo {
  Fiber fiber;
  Block* owner = nullptr;
  Warp* warp = nullptr;
  Wait wait;
  bool yielded = false;
  bool done = false;
  bool at_cluster_barrier = false;  // between arrive and wait
  uint64_t cluster_generation = 0;
  TransferList copies;  // cp.async
  TransferList bulk;    // cp.async.bulk to global memory
  TransferList stores;  // to other blocks' shared memory

  bool runnable() const { return !done && (wait.kind == Wait::kNothing || wait.is_over()); }
};

// What was last copied in bulk from somewhere in shared memory, after so many proxy fences of the block.
struct BulkSource {
  const void* source;
  uint64_t content, fences;
};

struct FreeMemory {
  void operator()(void* p) const;
};
using Memory = std::unique_ptr<void, FreeMemory>;

struct SharedArray {
  const void* key;  // null: the dynamic shared memory
  size_t bytes, alignment;
  Memory memory;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  Crew* crew = nullptr;
  Cluster* cluster = nullptr;
  uint3 index{};
  unsigned rank = 0;  // in the cluster
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  std::vector<MBarrier> mbarriers;
  std::vector<BulkSource> bulk_sources;
  uint64_t proxy_fences = 0;
  Barrier barrier;
  Barrier named[16];
  size_t live = 0;
  size_t static_bytes = 0;
  bool slow = false;  // runs when nothing else can

  // The array that holds all of [p, p + bytes), or null.
  SharedArray* find(const void* p, size_t bytes);
  SharedArray& static_array(const void* key, size_t bytes, size_t alignment);
};

struct Grid {
  LaunchConfig config;
  const std::function<void()>* body;
  int blocks;

  std::mutex mutex{};
  std::atomic<bool> failed{false};
  std::string message{};

  void fail(const std::string& why);
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {}
  // Below n.
  uint32_t operator()(uint32_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

// How willingly transfers arrive.
enum class Arrival { kLate, kMixed, kEager };

struct Crew {
  Grid* grid = nullptr;
  SchedulerContext scheduler;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Cluster> clusters;
  Barrier grid_barrier;
  size_t thread_count = 0;
  Random random{0};
  Arrival arrival = Arrival::kLate;
  TransferPool* transfers = nullptr;
  char order = 0;  // address for the happens-before edge from the threads' ends to the crew's

  // Lets some transfers arrive, chance decides which. With `at_least_one`, where there is one.
  void deliver_some(bool at_least_one);
};

Thread& self();
// Bytes that a block may have.
size_t shared_memory_limit();
// The calling thread does not run before wait is over.
void wait_for(const Wait& wait);
// One more has come to the barrier; whether it was the last one.
bool arrive_at(Barrier& barrier, unsigned needed);
void wait_at(Barrier& barrier, unsigned needed, const char* operation);
// All of the thread's remote stores arrive now, as before everything that orders memory.
void flush_stores(Thread& thread);
// Complaints about what a block leaves behind when its last thread returns; empty if there is none.
std::string check_exit(const Block& block);
// This OS thread's, empty.
TransferPool* transfer_pool();
// Fails in the running thread or, where the hardware itself finds fault, the launch.
void complain(Crew& crew, const std::string& what);
// A thread has arrived.
void count_arrival(MBarrier& barrier, const char* operation);
// Bytes of a transfer have arrived.
void complete_bytes(MBarrier& barrier, uint32_t bytes);
// The mbarrier at p in a block of the cluster; fails if there is none. Threads of its own block see it without a fence.
MBarrier& find_mbarrier(const void* p, const char* operation, bool needs_fence);
// The block of the cluster whose shared memory holds [p, p + bytes); fails if there is none or it must not be touched.
Block& find_block(const void* p, size_t bytes, size_t alignment, const char* operation);
std::string describe(const MBarrier& barrier);
std::string describe(const Block& block);

}  // namespace cuda_emulator
