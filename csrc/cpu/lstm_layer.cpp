// Plans a whole layer: every thread owns rows of a direction, and never waits for another before the end.
#include "lstm_layer.h"

#include "kernel_table.h"
#include "plan.h"
#include "team.h"

namespace fuseblock::cpu {

namespace {

constexpr int64_t kMostBytes = 1 << 20;  // of float weights; as much again for a thread's sums
constexpr int64_t kGrain = 1 << 15;      // elements

int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

int64_t all_rows(const Layout& l) { return l.start ? l.start[l.T - 1] + l.active[l.T - 1] : l.T * l.B; }

// How the rows of a layer are shared out; `passes` is the cost of a row in products with the weights.
struct Shares {
  int64_t parts;  // per direction
  bool parallel;
  std::vector<int64_t> bounds;

  Shares(const Layer& l, int64_t passes, const Threads& threads) {
    const Layout& y = l.layout;
    const int64_t row_cost = passes * 4 * y.H * (l.I + y.H) + kGateCost * y.H;
    const int64_t useful = all_rows(y) * y.D * row_cost / kWorkPerThread;
    const int64_t available = threads.count < useful ? threads.count : useful, each = available / y.D;
    parts = each < 1 ? 1 : each < y.B ? each : y.B;
    parallel = available > 1;
    bounds = row_bounds(y, parts);
  }
};

// Calls f(worker) for all of them at the same time; where there is too little work, one after the other.
template <class F>
void for_workers(const std::vector<LayerWorker>& workers, bool parallel, const Threads& threads, F&& f) {
  const Threads enough{threads.parallel_for, parallel ? threads.count : 1};
  parallel_for(enough, (int64_t)workers.size(), 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t j = begin; j < end; ++j) f(workers[j]);
  });
}

}  // namespace

bool lstm_layer_fits(int64_t input, int64_t hidden) {
  return (input + hidden) * 4 * hidden * (int64_t)sizeof(float) <= kMostBytes;
}

void lstm_layer(const LayerFwd& args, const Threads& threads) {
  const Layer& l = args.layer;
  const Layout& y = l.layout;
  const KernelTable& table = *kernel_table();
  const int64_t size = compute_bytes(y.dtype), lanes = table.vector_bytes / size, Z = l.I + 1 + y.H;
  const Shares shares(l, 1, threads);
  const int64_t blocks = divide_up(y.H, lanes), parts = shares.parts;
  const int64_t matrix = round_up(blocks * Z * 4 * lanes * size, 64);
  const int64_t rows = kLayerRows < y.B ? kLayerRows : y.B;
  const int64_t own = round_up(((kLayerRows + rows) * Z + kLayerRows * blocks * 4 * lanes) * size, 64);
  const Scratch memory = allocate(y.D * (matrix + parts * own));

  std::vector<LayerWorker> workers;
  for (int64_t d = 0; d < y.D; ++d) {
    char* const packed = memory.get() + d * matrix;
    parallel_for(threads, blocks, kGrain / (Z * 4 * lanes) + 1,
                 [&](int64_t begin, int64_t end) { table.layer_pack(l, d, packed, begin, end); });
    for (int64_t i = 0; i < parts; ++i)
      workers.push_back({d, shares.bounds[i], shares.bounds[i + 1], packed, {}, {},
                         memory.get() + y.D * matrix + (d * parts + i) * own, nullptr});
  }
  for_workers(workers, shares.parallel, threads, [&](const LayerWorker& w) { table.layer_fwd(args, w); });
}

void lstm_layer_bwd(const LayerBwd& given, const Threads& threads) {
  LayerBwd args = given;
  const Layer& l = args.layer;
  const Layout& y = l.layout;
  const KernelTable& table = *kernel_table();
  const int64_t size = compute_bytes(y.dtype), lanes = table.vector_bytes / size, Z = layer_sums_stride(l, lanes);
  const Shares shares(l, 2, threads);
  const int64_t parts = shares.parts;
  PackedMatrix hidden = flat_matrix(y.H, 4 * y.H, 1, y.H, lanes, 1), input = flat_matrix(l.I, 4 * y.H, 1, l.I, lanes, 1);
  const int64_t hidden_bytes = packed_elements(hidden, lanes) * size;
  const int64_t matrices = round_up(hidden_bytes + (args.dx ? packed_elements(input, lanes) * size : 0), 64);
  const int64_t rows = kLayerRows < y.B ? kLayerRows : y.B;
  const int64_t sums = round_up(4 * y.H * (Z + 1) * size, 64);
  const int64_t own = round_up(((kLayerRows + rows) * 4 * y.H + kLayerRows * Z) * size, 64) + sums;
  const int64_t dx_elements = args.dx ? all_rows(y) * l.I : 0, reverse_bytes = y.D == 2 ? dx_elements * size : 0;
  const Scratch memory = allocate(y.D * (matrices + parts * own) + reverse_bytes);
  args.dx_reverse = memory.get() + y.D * (matrices + parts * own);

  std::vector<LayerWorker> workers;
  for (int64_t d = 0; d < y.D; ++d) {
    hidden.source = l.weights[d].hh, hidden.packed = memory.get() + d * matrices;
    input.source = l.weights[d].ih, input.packed = args.dx ? memory.get() + d * matrices + hidden_bytes : nullptr;
    for (const PackedMatrix* m : {&hidden, &input})
      if (m->packed)
        parallel_for(threads, m->blocks, kGrain / (packed_elements(*m, lanes) / m->blocks + 1) + 1,
                     [&](int64_t begin, int64_t end) { table.pack(*m, y.dtype, begin, end); });
    for (int64_t i = 0; i < parts; ++i) {
      char* const scratch = memory.get() + y.D * matrices + (d * parts + i) * own;
      workers.push_back({d, shares.bounds[i], shares.bounds[i + 1], nullptr, hidden, input, scratch, scratch + own - sums});
    }
  }
  for_workers(workers, shares.parallel, threads, [&](const LayerWorker& w) { table.layer_bwd(args, w); });

  for (int64_t d = 0; d < y.D; ++d)
    parallel_for(threads, 4 * y.H, kGrain / (Z * parts + 1) + 1, [&](int64_t begin, int64_t end) {
      table.layer_finish(args, d, workers[d * parts].sums, parts, own, begin, end);
    });
  if (y.D == 2 && args.dx)
    parallel_for(threads, dx_elements, kGrain,
                 [&](int64_t begin, int64_t end) { table.layer_add_dx(args, begin, end); });
}

}  // namespace fuseblock::cpu
