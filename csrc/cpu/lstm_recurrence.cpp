// Plans a recurrence: how many threads, what each computes, what is packed, and where scratch lies.
//
// Work splits over directions first, then over rows (threads never wait for each other) or, when there are few rows
// or the weights exceed a core's cache, over units: then all threads meet at a barrier after every step.
#include "lstm_recurrence.h"

#include <memory>
#include <vector>

#include "barrier.h"
#include "kernel_table.h"
#include "plan.h"
#include "team.h"

namespace fuseblock::cpu {

namespace {

constexpr int64_t kWorkPerBarrier = 1 << 16;  // per thread and step
constexpr int64_t kRowsWithoutPacking = 4;    // of all steps, or of one step if the weights are large
constexpr int64_t kCacheBytes = 1 << 20;      // of weights that every core can hold for itself

struct Split {
  int64_t row_parts, members;  // per direction; one of them is 1
  bool parallel;
};

Split choose_split(const Layout& l, bool projected, const Threads& threads) {
  const int64_t macs = 4 * l.H * l.P + (projected ? l.H * l.P : 0), row_cost = macs + kGateCost * l.H;
  int64_t row_steps = l.T * l.B;
  if (l.active) {
    row_steps = 0;
    for (int64_t t = 0; t < l.T; ++t) row_steps += l.active[t];
  }
  const int64_t useful = row_steps * l.D * row_cost / kWorkPerThread;
  const int64_t available = threads.count < useful ? threads.count : useful;
  const int64_t per_direction = available / l.D;
  if (per_direction <= 1) return {1, 1, available > 1};

  const int64_t rows = divide_up(row_steps, l.T), cpus = available_cpus() / l.D;
  const bool few_rows = rows < 2 * per_direction, large = macs * compute_bytes(l.dtype) > kCacheBytes;
  if (few_rows || large) {
    int64_t members = per_direction < cpus ? per_direction : cpus;
    const int64_t worth = rows * row_cost / kWorkPerBarrier;
    if (members > worth) members = worth;
    if (members > 1) return {1, members, true};
  }
  return {per_direction < l.B ? per_direction : l.B, 1, true};
}

PackedMatrix gates_matrix(const Layout& l, int64_t lanes) {
  const int64_t vectors = divide_up(l.H, lanes);
  return {nullptr, nullptr, l.H, l.P, l.P, 1, vectors, vectors, true};
}

// Packing pays when the packed weights are used more than a few times. Where they exceed the cache and meet few rows in
// every step, reading them dominates and is as fast from the matrix itself.
bool worth_packing(const Layout& l, const PackedMatrix& m, int64_t lanes, int64_t members) {
  if (m.k_stride != 1) return true;
  const bool large = packed_elements(m, lanes) * compute_bytes(l.dtype) > members * kCacheBytes;
  return l.T * l.B > kRowsWithoutPacking && !(large && l.B <= kRowsWithoutPacking);
}

template <class Args>
struct Run {
  const Args& args;
  void (*kernel)(const Args&, const Part&);
  const KernelTable& table;
  std::vector<Part> parts;

  void operator()(int64_t j) const {
    const FlushSubnormals flush;
    const Part& part = parts[j];
    if (part.members > 1) {  // each thread packs what it alone will read
      for (const PackedMatrix* m : {&part.hidden, &part.projection})
        if (m->packed)
          table.pack(*m, args.layout.dtype, m->blocks * part.member / part.members,
                     m->blocks * (part.member + 1) / part.members);
    }
    kernel(args, part);
  }
};

// carry_row: elements of carry per row. hidden, projection: the matrices of direction 0, not yet placed.
template <class Args>
void run(const Args& args, void (*kernel)(const Args&, const Part&), const Split& split, int64_t carry_row,
         PackedMatrix hidden, PackedMatrix projection, const Threads& threads) {
  const Layout& l = args.layout;
  const KernelTable& table = *kernel_table();
  const int64_t size = compute_bytes(l.dtype), lanes = table.vector_bytes / size;
  const bool projected = args.weights.hr != nullptr;
  const bool pack_hidden = worth_packing(l, hidden, lanes, split.members), pack_projection = projected && worth_packing(l, projection, lanes, split.members);
  const int64_t hidden_bytes = pack_hidden ? packed_elements(hidden, lanes) * size : 0;
  const int64_t projection_bytes = pack_projection ? packed_elements(projection, lanes) * size : 0;
  const int64_t weight_bytes = divide_up(hidden_bytes + projection_bytes, 64) * 64;
  const Scratch weights = allocate(l.D * weight_bytes), carry = allocate(l.D * l.B * carry_row * size);

  const std::vector<int64_t> bounds = row_bounds(l, split.row_parts);
  std::unique_ptr<Barrier[]> barriers(new Barrier[l.D]);
  Run<Args> job{args, kernel, table, {}};
  for (int64_t d = 0; d < l.D; ++d) {
    barriers[d].members = split.members;
    hidden.source = static_cast<const char*>(args.weights.hh) + d * 4 * l.H * l.P * storage_bytes(l.dtype);
    hidden.packed = pack_hidden ? weights.get() + d * weight_bytes : nullptr;
    if (projected) {
      projection.source = static_cast<const char*>(args.weights.hr) + d * l.P * l.H * storage_bytes(l.dtype);
      projection.packed = pack_projection ? weights.get() + d * weight_bytes + hidden_bytes : nullptr;
    }
    for (int64_t i = 0; i < split.row_parts; ++i) {
      void* own = carry.get() + (d * l.B + bounds[i]) * carry_row * size;
      for (int64_t m = 0; m < split.members; ++m)
        job.parts.push_back({d, bounds[i], bounds[i + 1], m, split.members, &barriers[d], own, hidden, projection});
    }
  }

  const int64_t n = (int64_t)job.parts.size();
  if (split.members > 1) {
    auto work = [](int64_t j, void* context) { (*static_cast<const Run<Args>*>(context))(j); };
    if (run_together(threads, n, work, &job)) return;
    for (int64_t d = 0; d < l.D; ++d) {  // alone: the first member of each team does everything
      job.parts[d] = job.parts[d * split.members];
      job.parts[d].members = 1;
    }
    job.parts.resize(l.D);
  }

  auto pack = [&](PackedMatrix Part::*matrix) {
    for (int64_t d = 0; d < l.D; ++d) {
      const PackedMatrix& m = job.parts[d * split.row_parts].*matrix;
      if (!m.packed) continue;
      const int64_t grain = kPackGrain / (packed_elements(m, lanes) / m.blocks + 1) + 1;
      parallel_for(threads, m.blocks, grain,
                   [&](int64_t begin, int64_t end) { table.pack(m, l.dtype, begin, end); });
    }
  };
  pack(&Part::hidden);
  pack(&Part::projection);
  const Threads enough{threads.parallel_for, split.parallel ? threads.count : 1};
  parallel_for(enough, (int64_t)job.parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) job(j);
  });
}

int64_t lanes_of(const Layout& l) { return kernel_table()->vector_bytes / compute_bytes(l.dtype); }

}  // namespace

void lstm_recurrence(const RecurrenceFwd& args, const Threads& threads) {
  const Layout& l = args.layout;
  const bool projected = args.weights.hr != nullptr;
  const Split split = choose_split(l, projected, threads);
  run(args, kernel_table()->recurrence_fwd, split, 2 * l.P + (projected ? l.H : 0), gates_matrix(l, lanes_of(l)),
      flat_matrix(l.P, l.H, l.H, 1, lanes_of(l), split.members), threads);
}

void lstm_recurrence_bwd(const RecurrenceBwd& args, const Threads& threads) {
  const Layout& l = args.layout;
  const bool projected = args.weights.hr != nullptr;
  const Split split = choose_split(l, projected, threads);
  run(args, kernel_table()->recurrence_bwd, split, 8 * l.H + (projected ? l.P : 0),
      flat_matrix(l.P, 4 * l.H, 1, l.P, lanes_of(l), split.members),
      flat_matrix(l.H, l.P, 1, l.H, lanes_of(l), split.members), threads);
}

void lstm_recurrence_bwd_bwd(const RecurrenceBwdBwd& args, const RecurrenceBwd& first, const Threads& threads) {
  const Layout& l = args.layout;
  const bool projected = args.weights.hr != nullptr;
  lstm_recurrence_bwd(first, threads);
  const Split split = choose_split(l, projected, threads);
  run(args, kernel_table()->recurrence_bwd_bwd, split, 2 * l.P + (projected ? l.H : 0), gates_matrix(l, lanes_of(l)),
      flat_matrix(l.P, l.H, l.H, 1, lanes_of(l), split.members), threads);
}

}  // namespace fuseblock::cpu
