#include "lstm_gates.h"

#include "kernel_table.h"
#include "team.h"

namespace fuseblock::cpu {

namespace {

// Waking the pool costs several microseconds, in which one thread does about this many units.
constexpr int64_t kUnitsPerThread = 16384;

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, const Threads& threads) {
  const int64_t grain = kUnitsPerThread / (args.shape.H + 1) + 1;
  parallel_for(threads, args.shape.rows, grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    kernel(args, begin, end);
  });
}

}  // namespace

void lstm_gates(const GatesFwd& args, const Threads& threads) { run(kernel_table()->gates_fwd, args, threads); }
void lstm_gates_bwd(const GatesBwdArgs& args, const Threads& threads) {
  run(kernel_table()->gates_bwd, args, threads);
}
void lstm_gates_bwd_bwd(const GatesBwdBwdArgs& args, const Threads& threads) {
  run(kernel_table()->gates_bwd_bwd, args, threads);
}

}  // namespace fuseblock::cpu
