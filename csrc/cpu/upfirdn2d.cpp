#include "upfirdn2d.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "kernel_table.h"

namespace fuseblock::cpu {

namespace {

constexpr int64_t kCacheLine = 64;
// Longest vector, in elements: kernels read so far beyond the last pixel of a row.
constexpr int64_t kSlack = 16;
// Rows shorter than this are worked on several planes at a time: what a row costs beside its products is shared.
constexpr int64_t kShortRow = 256;
// Bytes of input that the taps of one pixel's channels may cover, so that the next pixel finds them in the first cache.
constexpr int64_t kTapBytes = 32768;
// Waking the pool costs several microseconds, in which one thread does about this many products.
constexpr int64_t kProductsPerThread = 131072;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A plan and the tables that it points to.
struct OwnedPlan : Upfirdn2dPlan {
  std::vector<RowTap> tap_table;
  std::vector<int64_t> phase_table;

  OwnedPlan(const Upfirdn2d& args, int64_t threads);
};

OwnedPlan::OwnedPlan(const Upfirdn2d& a, int64_t threads) : Upfirdn2dPlan{a} {
  const int64_t common = std::gcd(a.up_x, a.down_x);
  phases_out = a.up_x / common;
  phases_in = a.down_x / common;
  for (int64_t r = 0; r < phases_out; ++r) {
    phase_table.push_back((int64_t)tap_table.size());
    for (int64_t k = 0; k < a.taps_x; ++k) {
      const int64_t place = r * a.down_x + k - a.pad_x;
      if (place % a.up_x != 0) continue;
      const int64_t pixel = place / a.up_x, offset = floor_div(pixel, phases_in);
      tap_table.push_back({k, pixel - offset * phases_in, offset});
    }
  }
  phase_table.push_back((int64_t)tap_table.size());
  taps = tap_table.data();
  phase_taps = phase_table.data();
  int64_t last_offset = 0;
  first_offset = 0;
  if (!tap_table.empty()) {
    const auto less = [](const RowTap& s, const RowTap& t) { return s.offset < t.offset; };
    const auto ends = std::minmax_element(tap_table.begin(), tap_table.end(), less);
    first_offset = ends.first->offset;
    last_offset = ends.second->offset;
  }
  quotients = (a.out_w + phases_out - 1) / phases_out;
  split_pixels = quotients + last_offset - first_offset;

  const int64_t element = a.dtype == DType::f64 ? 8 : 4;
  chunk = std::min(a.channels, std::max<int64_t>(64, kTapBytes / element / (a.taps_x * a.taps_y) / 16 * 16));
  chunks = (a.channels + chunk - 1) / chunk;
  group = a.channels > 1 ? 1 : std::clamp<int64_t>(2 * kShortRow / split_pixels, 1, a.planes);
  if (split_pixels >= kShortRow) group = 1;
  if (threads > 1) group = std::min(group, (a.planes + threads - 1) / threads);
  groups = (a.planes + group - 1) / group;
  ring_rows = (a.taps_y - 1) / a.up_y + 1;
  line = round_up(group * split_pixels * chunk + kSlack, kSlack);
  whole_line = a.channels > 1 ? 0 : line * std::max(phases_in, phases_out);
  const int64_t elements = (ring_rows * phases_in + phases_out) * line + 2 * whole_line;
  const int64_t pointers = ring_rows + ring_rows * a.taps_x;  // tags of the ring, sources of an output row
  scratch_bytes = round_up(element * (elements + ring_rows * a.taps_x) + 8 * pointers, kCacheLine);
}

}  // namespace

void upfirdn2d(const Upfirdn2d& args, const Threads& threads) {
  const OwnedPlan plan(args, threads.count);
  const int64_t rows = plan.groups * plan.chunks * args.out_h;
  const int64_t products = plan.group * args.out_w * plan.chunk * ((args.taps_y - 1) / args.up_y + 1) * ((args.taps_x - 1) / args.up_x + 1);
  parallel_for(threads, rows, kProductsPerThread / (products + 1) + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(kCacheLine, (size_t)plan.scratch_bytes), std::free);
    if (!scratch) throw std::bad_alloc();
    kernel_table()->upfirdn2d(plan, begin, end, scratch.get());
  });
}

}  // namespace fuseblock::cpu
