// Clusters of blocks: their barrier, each other's shared memory, mbarriers.
#include <cstdio>

#include "hardware.h"
#include "scheduler.h"

namespace cuda_emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;
constexpr uint64_t kMark = 0x6d62617272696572;  // in the 8 bytes of every mbarrier

uint64_t& word(const MBarrier& barrier) { return *static_cast<uint64_t*>(barrier.address); }

void complete_phase(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  for (const Thread& thread : barrier.owner->threads) {
    if (thread.wait.kind == Wait::kMBarrier && thread.wait.what == &barrier && thread.wait.value != barrier.phase) {
      return complain(*barrier.owner->crew,
                      describe(barrier) + " ends before a thread that waits for the phase before it has seen that");
    }
  }
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

void check_bytes(const MBarrier& barrier) {
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
    complain(*barrier.owner->crew, describe(barrier) + ": too many bytes");
  }
}

// Block of the cluster that has [p, p + bytes); null if there is none.
Block* owner_of(const void* p, size_t bytes) {
  Block& mine = *self().owner;
  if (mine.find(p, bytes) != nullptr) return &mine;
  for (Block* block : mine.cluster->blocks) {
    if (block->find(p, bytes) != nullptr) return block;
  }
  return nullptr;
}

void check_reachable(const Block& block, const char* operation) {
  if (&block == self().owner) return;
  if (block.cluster->barrier.generation == 0) {
    fail("%s: %s may not have started yet (no cluster barrier was passed)", operation, describe(block).c_str());
  }
  if (block.live == 0) fail("%s: %s has returned", operation, describe(block).c_str());
}

}  // namespace

std::string describe(const MBarrier& barrier) {
  const SharedArray* array = barrier.owner->find(barrier.address, 8);
  char text[200];
  std::snprintf(text, sizeof(text),
                "the mbarrier at byte %td of %s shared memory of %s in phase %llu "
                "(%u of %u arrivals and %lld bytes missing)",
                static_cast<char*>(barrier.address) - static_cast<char*>(array->memory.get()),
                array->key == nullptr ? "dynamic" : "static", describe(*barrier.owner).c_str(),
                static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.arrivals,
                static_cast<long long>(barrier.bytes));
  return text;
}

void complete_bytes(MBarrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  check_bytes(barrier);
  complete_phase(barrier);
}

Block& find_block(const void* p, size_t bytes, size_t alignment, const char* operation) {
  check_alignment(p, alignment, operation);
  Block* const block = owner_of(p, bytes);
  if (block == nullptr) {
    fail("%s: %zu bytes at %p are not in the shared memory of one block of the cluster", operation, bytes, p);
  }
  check_reachable(*block, operation);
  return *block;
}

MBarrier& find_mbarrier(const void* p, const char* operation, bool needs_fence) {
  Block& block = find_block(p, 8, 8, operation);
  for (MBarrier& barrier : block.mbarriers) {
    if (barrier.address != p || !barrier.valid) continue;
    if (word(barrier) != kMark) fail("%s: %s was overwritten", operation, describe(barrier).c_str());
    if (barrier.unfenced != nullptr && (needs_fence || &block != self().owner)) {
      fail("%s: no fence.mbarrier_init after the initialisation of %s", operation, describe(barrier).c_str());
    }
    return barrier;
  }
  fail("%s: there is no mbarrier at %p in the shared memory of %s, or not yet", operation, p, describe(block).c_str());
}

void check_alignment(const void* p, size_t alignment, const char* operation) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("%s: %p is not a multiple of %zu", operation, p, alignment);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* operation) {
  check_alignment(p, alignment, operation);
  if (self().owner->find(p, bytes) == nullptr) {
    fail("%s: %zu bytes at %p are not in the block's shared memory", operation, bytes, p);
  }
}

void check_cluster(const void* p, size_t bytes, size_t alignment, const char* operation) {
  find_block(p, bytes, alignment, operation);
  flush_stores(self());
}

ClusterPlace cluster_place(const void* p, unsigned rank) {
  Block& mine = *self().owner;
  if (rank >= mine.cluster->blocks.size()) fail("mapa: the cluster has no block %u", rank);
  const SharedArray* array = mine.find(p, 1);
  if (array == nullptr) fail("mapa: %p is not in the block's shared memory", p);
  Block& other = *mine.cluster->blocks[rank];
  const SharedArray& there =
      array->key == nullptr ? other.shared.front() : other.static_array(array->key, array->bytes, array->alignment);
  char* const begin = static_cast<char*>(there.memory.get());
  return {begin + (static_cast<const char*>(p) - static_cast<const char*>(array->memory.get())), begin, begin + there.bytes};
}

void cluster_arrive() {
  Thread& thread = self();
  Cluster& cluster = *thread.owner->cluster;
  if (thread.at_cluster_barrier) fail("barrier.cluster.arrive: a thread arrives twice without a wait");
  thread.at_cluster_barrier = true;
  thread.cluster_generation = cluster.barrier.generation;
  arrive_at(cluster.barrier, static_cast<unsigned>(cluster.blocks.size() * thread.owner->threads.size()));
}

void cluster_wait() {
  Thread& thread = self();
  Cluster& cluster = *thread.owner->cluster;
  if (!thread.at_cluster_barrier) fail("barrier.cluster.wait without barrier.cluster.arrive");
  const Wait wait{Wait::kBarrier, &cluster.barrier, thread.cluster_generation, "barrier.cluster"};
  if (!wait.is_over()) wait_for(wait);
  thread.at_cluster_barrier = false;
  acquire(&cluster.barrier);
}

void mbarrier_init(void* mbarrier, unsigned arrivals) {
  const char* const operation = "mbarrier.init";
  check_shared(mbarrier, 8, 8, operation);
  if (arrivals == 0 || arrivals > kMostBytes) fail("%s: %u arrivals", operation, arrivals);
  Block& block = *self().owner;
  MBarrier* unused = nullptr;
  for (MBarrier& barrier : block.mbarriers) {
    if (barrier.address == mbarrier && barrier.valid) fail("%s: %s exists already", operation, describe(barrier).c_str());
    if (!barrier.valid) unused = &barrier;
  }
  if (unused == nullptr) {
    if (block.mbarriers.size() == kMBarrierLimit) fail("%s: more than %zu in a block", operation, kMBarrierLimit);
    unused = &block.mbarriers.emplace_back();
  }
  *unused = {mbarrier, &block, arrivals, arrivals, 0, 0, true, &self()};
  word(*unused) = kMark;
}

void fence_mbarrier_init() {
  flush_stores(self());
  for (MBarrier& barrier : self().owner->mbarriers) {
    if (barrier.unfenced == &self()) barrier.unfenced = nullptr;
  }
}

void mbarrier_invalidate(void* mbarrier) {
  MBarrier& barrier = find_mbarrier(mbarrier, "mbarrier.inval", false);
  if (barrier.bytes != 0) fail("mbarrier.inval of %s", describe(barrier).c_str());
  barrier.valid = false;
  word(barrier) = ~0ull;
}

void count_arrival(MBarrier& barrier, const char* operation) {
  if (barrier.pending == 0) {
    return complain(*barrier.owner->crew, std::string(operation) + ": one arrival too many at " + describe(barrier));
  }
  --barrier.pending;
  complete_phase(barrier);
}

void mbarrier_arrive(void* mbarrier, const char* operation) {
  flush_stores(self());
  MBarrier& barrier = find_mbarrier(mbarrier, operation, false);
  if (barrier.owner != self().owner) fail("%s: the mbarrier is another block's", operation);
  release(&barrier);
  count_arrival(barrier, operation);
}

void mbarrier_expect(void* mbarrier, uint32_t bytes, const char* operation) {
  MBarrier& barrier = find_mbarrier(mbarrier, operation, false);
  if (barrier.owner != self().owner) fail("%s: the mbarrier is another block's", operation);
  barrier.bytes += bytes;
  check_bytes(barrier);
  complete_phase(barrier);
}

bool mbarrier_try_wait(void* mbarrier, unsigned parity) {
  const char* const operation = "mbarrier.try_wait";
  MBarrier& barrier = find_mbarrier(mbarrier, operation, false);
  if (barrier.owner != self().owner) fail("%s: the mbarrier is another block's", operation);
  if (parity > 1) fail("%s: parity %u", operation, parity);
  if ((barrier.phase & 1) == parity) return false;
  acquire(&barrier);
  return true;
}

void mbarrier_wait(void* mbarrier, unsigned parity) {
  if (mbarrier_try_wait(mbarrier, parity)) return;
  MBarrier& barrier = find_mbarrier(mbarrier, "mbarrier.try_wait", false);
  wait_for({Wait::kMBarrier, &barrier, barrier.phase, "mbarrier.try_wait"});
  acquire(&barrier);
}

}  // namespace cuda_emulator
