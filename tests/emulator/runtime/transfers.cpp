// Asynchronous copies and remote stores: under way from their issue until they arrive, at a time that chance decides.
#include <sys/mman.h>

#include <algorithm>

#include "counting.h"
#include "hardware.h"
#include "scheduler.h"

namespace cuda_emulator {
namespace {

template <class T>
T* reserve(uint32_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

void move_bytes(void* argument) {
  Transfer& transfer = *static_cast<Transfer*>(argument);
  acquire(&transfer);
  const void* const source = transfer.source == nullptr ? transfer.value : transfer.source;
  count_load(source, transfer.bytes);
  count_store(transfer.destination, transfer.bytes);
  if (transfer.bytes > 0) std::memcpy(transfer.destination, source, transfer.bytes);
  if (transfer.zeros > 0) std::memset(static_cast<char*>(transfer.destination) + transfer.bytes, 0, transfer.zeros);
  release(&transfer);
  if (transfer.completes != nullptr) release(transfer.completes);
}

void deliver(Crew& crew, uint32_t number) {
  TransferPool& pool = *crew.transfers;
  Transfer& transfer = pool[number];
  // A long copy that an mbarrier counts may arrive in two parts.
  if (transfer.completes != nullptr && transfer.bytes >= 32 && crew.arrival != Arrival::kLate && crew.random(4) == 0) {
    const uint32_t whole = transfer.bytes, part = transfer.bytes / 32 * 16;
    transfer.bytes = part;
    as_copy_engine(move_bytes, &transfer);
    transfer.bytes = whole - part;
    transfer.destination = static_cast<char*>(transfer.destination) + part;
    if (transfer.source != nullptr) transfer.source = static_cast<const char*>(transfer.source) + part;
    return complete_bytes(*transfer.completes, part);
  }
  as_copy_engine(move_bytes, &transfer);
  pool.arrived(number);
  const Transfer done = transfer;
  if (!done.owned) pool.give_back(number);
  if (done.arrival) {
    count_arrival(*done.completes, done.operation);
  } else if (done.completes != nullptr) {
    complete_bytes(*done.completes, done.bytes);
  }
}

// What the list holds up to that group arrives, and is forgotten.
void finish(Crew& crew, TransferList& list, uint64_t last_group) {
  TransferPool& pool = *crew.transfers;
  while (list.first != TransferList::kNone && pool[list.first].group <= last_group) {
    const uint32_t number = list.first;
    if (!pool[number].arrived) deliver(crew, number);
    acquire(&pool[number]);
    list.first = pool[number].next;
    if (list.first == TransferList::kNone) list.last = TransferList::kNone;
    pool.give_back(number);
  }
}

Transfer& issue(const Transfer& transfer, TransferList* list) {
  Crew& crew = *self().owner->crew;
  TransferPool& pool = *crew.transfers;
  while (pool.full() && pool.under_way() > 0) crew.deliver_some(true);
  if (pool.full()) fail("more than %u asynchronous copies without a wait", TransferPool::kSize);
  const uint32_t number = pool.take();
  const uint32_t position = pool[number].position;
  Transfer& issued = pool[number];
  issued = transfer;
  issued.position = position;
  issued.arrived = false;
  issued.next = TransferList::kNone;
  issued.owned = list != nullptr;
  issued.stores_of = list == &self().stores ? &self() : nullptr;
  if (list != nullptr) {
    issued.group = list->group;
    (list->last == TransferList::kNone ? list->first : pool[list->last].next) = number;
    list->last = number;
  }
  release(&issued);
  return issued;
}

// A bulk copy reads through another proxy than threads write: what has changed since the last copy from there needs a fence.
// Only a block that has none at all in between is found out.
void check_proxy(const void* source, uint32_t bytes, const char* operation) {
  Block& block = *self().owner;
  uint64_t content = 14695981039346656037u;
  for (uint32_t n = 0; n < bytes; ++n) content = (content ^ static_cast<const unsigned char*>(source)[n]) * 1099511628211u;
  BulkSource* last = nullptr;
  for (BulkSource& known : block.bulk_sources) {
    if (known.source == source) last = &known;
  }
  if (block.proxy_fences == (last == nullptr ? 0 : last->fences) && (last == nullptr || last->content != content)) {
    fail("%s: no fence.proxy.async since the source was written", operation);
  }
  if (last == nullptr) {
    if (block.bulk_sources.size() == kBulkSourceLimit) return;
    last = &block.bulk_sources.emplace_back();
  }
  *last = {source, content, block.proxy_fences};
}

// Groups up to this one are complete when `groups_left` of those that are committed may be under way; false: none.
bool last_group(const TransferList& list, uint64_t groups_left, uint64_t& group) {
  if (list.group <= groups_left) return false;
  group = list.group - groups_left - 1;
  return true;
}

}  // namespace

TransferPool::TransferPool() : transfers_(reserve<Transfer>(kSize)), numbers_(reserve<uint32_t>(kSize)) {}

TransferPool::~TransferPool() {
  munmap(transfers_, kSize * sizeof(Transfer));
  munmap(numbers_, kSize * sizeof(uint32_t));
}

void TransferPool::clear() {
  count_ = fresh_ = 0;
  unused_ = kNone;
}

uint32_t TransferPool::take() {
  const uint32_t number = unused_ == kNone ? fresh_++ : unused_;
  if (number == unused_) unused_ = transfers_[number].next;
  transfers_[number].position = count_;
  numbers_[count_++] = number;
  return number;
}

void TransferPool::arrived(uint32_t number) {
  transfers_[number].arrived = true;
  const uint32_t position = transfers_[number].position, last = numbers_[--count_];
  numbers_[position] = last;
  transfers_[last].position = position;
}

void TransferPool::give_back(uint32_t number) {
  transfers_[number].next = unused_;
  unused_ = number;
}

TransferPool* transfer_pool() {
  static thread_local TransferPool pool;
  pool.clear();
  return &pool;
}

void Crew::deliver_some(bool at_least_one) {
  const uint32_t count = transfers->under_way();
  if (count == 0 || (arrival == Arrival::kLate && !at_least_one)) return;
  uint32_t share = arrival == Arrival::kEager ? count : random(count / 4 + 2);
  if (arrival == Arrival::kEager && random(4) == 0) share = 0;
  if (at_least_one) share = std::max(share, 1 + count / 4);
  for (; share > 0 && transfers->under_way() > 0 && !grid->failed; --share) {
    uint32_t number = transfers->number(random(transfers->under_way()));
    if (const Thread* thread = (*transfers)[number].stores_of) {
      number = thread->stores.first;
      while ((*transfers)[number].arrived) number = (*transfers)[number].next;
    }
    deliver(*this, number);
  }
}

void flush_stores(Thread& thread) {
  if (thread.stores.first != TransferList::kNone) finish(*thread.owner->crew, thread.stores, ~0ull);
}

std::string check_exit(const Block& block) {
  TransferPool& pool = *block.crew->transfers;
  for (uint32_t n = 0; n < pool.under_way(); ++n) {
    const Transfer& transfer = pool[pool.number(n)];
    if (transfer.to == &block) return std::string("returns while ") + transfer.operation + " to it is under way";
    if (transfer.from == &block) return std::string("returns while ") + transfer.operation + " from it is under way";
  }
  for (const MBarrier& barrier : block.mbarriers) {
    if (barrier.valid && barrier.bytes != 0) return "returns and leaves " + describe(barrier);
  }
  return "";
}

void fence_async_proxy() { ++self().owner->proxy_fences; }

void copy_async(void* destination, const void* source, uint32_t bytes, uint32_t zeros) {
  Thread& thread = self();
  issue({.operation = "cp.async", .destination = destination, .source = source, .bytes = bytes, .zeros = zeros,
         .to = thread.owner},
        &thread.copies);
}

void copy_async_commit() { ++self().copies.group; }

void copy_async_wait(uint64_t groups_left) {
  Thread& thread = self();
  uint64_t group;
  if (last_group(thread.copies, groups_left, group)) finish(*thread.owner->crew, thread.copies, group);
}

void copy_async_wait_all() { finish(*self().owner->crew, self().copies, ~0ull); }

void store_remote(void* destination, const void* value, uint32_t bytes) {
  const char* const operation = "st.shared::cluster";
  Transfer transfer{.operation = operation, .destination = destination, .bytes = bytes,
                    .to = &find_block(destination, bytes, bytes, operation)};
  std::memcpy(transfer.value, value, bytes);
  issue(transfer, &self().stores);
}

void store_global(void* destination, const void* value, uint32_t bytes) {
  Transfer transfer{.operation = "st.global", .destination = destination, .bytes = bytes};
  std::memcpy(transfer.value, value, bytes);
  issue(transfer, &self().stores);
}

void mbarrier_arrive_remote(void* mbarrier) {
  const char* const operation = "mbarrier.arrive.shared::cluster";
  flush_stores(self());
  MBarrier& barrier = find_mbarrier(mbarrier, operation, true);
  issue({.operation = operation, .bytes = 0, .to = barrier.owner, .completes = &barrier, .arrival = true}, nullptr);
}

void store_async(void* destination, const void* value, uint32_t bytes, void* mbarrier) {
  const char* const operation = "st.async";
  Block& to = find_block(destination, bytes, bytes, operation);
  MBarrier& completes = find_mbarrier(mbarrier, operation, true);
  if (completes.owner != &to) fail("%s: the mbarrier is not in the block that receives the data", operation);
  Transfer transfer{.operation = operation, .destination = destination, .bytes = bytes, .to = &to,
                    .completes = &completes};
  std::memcpy(transfer.value, value, bytes);
  issue(transfer, nullptr);
}

void copy_bulk(void* destination, const void* source, uint32_t bytes, void* mbarrier, bool from_shared) {
  const char* const operation = "cp.async.bulk";
  if (bytes % 16 != 0) fail("%s: %u bytes are not a multiple of 16", operation, bytes);
  if (from_shared) {
    check_shared(source, bytes, 16, operation);
    check_proxy(source, bytes, operation);
  } else {
    check_alignment(source, 16, operation);
  }
  Block& to = find_block(destination, bytes, 16, operation);
  MBarrier& completes = find_mbarrier(mbarrier, operation, true);
  if (completes.owner != &to) fail("%s: the mbarrier is not in the block that receives the data", operation);
  if (bytes == 0) return;
  issue({.operation = operation, .destination = destination, .source = source, .bytes = bytes,
         .from = from_shared ? self().owner : nullptr, .to = &to, .completes = &completes},
        nullptr);
}

void copy_bulk_to_global(void* destination, const void* source, uint32_t bytes) {
  const char* const operation = "cp.async.bulk.global";
  if (bytes % 16 != 0) fail("%s: %u bytes are not a multiple of 16", operation, bytes);
  check_shared(source, bytes, 16, operation);
  check_proxy(source, bytes, operation);
  check_alignment(destination, 16, operation);
  Thread& thread = self();
  if (bytes == 0) return;
  issue({.operation = operation, .destination = destination, .source = source, .bytes = bytes, .from = thread.owner},
        &thread.bulk);
}

void copy_bulk_commit() { ++self().bulk.group; }

void copy_bulk_wait(uint64_t groups_left) {
  Thread& thread = self();
  uint64_t group;
  if (last_group(thread.bulk, groups_left, group)) finish(*thread.owner->crew, thread.bulk, group);
}

}  // namespace cuda_emulator
