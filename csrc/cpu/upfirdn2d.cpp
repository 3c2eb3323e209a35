#include "upfirdn2d.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
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
// Waking the pool costs several microseconds, in which one thread does about this many products.
constexpr int64_t kProductsPerThread = 131072;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A plan and the tables that it points to.
struct OwnedPlan : Upfirdn2dPlan {
  std::vector<RowTap> tap_table;
  std::vector<RowPhase> phase_table;
  std::vector<char> factors;

  OwnedPlan(const Upfirdn2d& args, int64_t threads);

  template <class C>
  void factor();
};

// Finds the factors of a filter that is an outer product, as far as rounding of its taps and of the gain lets it be one.
template <class C>
void OwnedPlan::factor() {
  const Upfirdn2d& a = args;
  const C* const w = static_cast<const C*>(a.weights);
  const int64_t count = a.taps_y * a.taps_x, pivot = std::find_if(w, w + count, [](C tap) { return tap != 0; }) - w;
  if (pivot == count) return;
  factors.resize((size_t)(a.taps_x + a.taps_y) * sizeof(C));
  C *const row = reinterpret_cast<C*>(factors.data()), *const column = row + a.taps_x;
  const C *const pivot_row = w + pivot / a.taps_x * a.taps_x, *const pivot_column = w + pivot % a.taps_x;
  // A power of two keeps sums along x as large as pixels.
  const C* const largest = std::max_element(pivot_row, pivot_row + a.taps_x, [](C s, C t) { return std::abs(s) < std::abs(t); });
  const int exponent = std::ilogb(*largest / w[pivot]);
  for (int64_t l = 0; l < a.taps_x; ++l) row[l] = std::ldexp(pivot_row[l] / w[pivot], -exponent);
  for (int64_t k = 0; k < a.taps_y; ++k) column[k] = std::ldexp(pivot_column[k * a.taps_x], exponent);
  for (int64_t i = 0; i < count; ++i) {
    // Every tap is rounded twice, as is every factor.
    const C error = std::abs(column[i / a.taps_x] * row[i % a.taps_x] - w[i]);
    if (!(error <= 4 * std::numeric_limits<C>::epsilon() * std::abs(w[i]))) return;
  }
  row_factor = row;
  column_factor = column;
}

OwnedPlan::OwnedPlan(const Upfirdn2d& a, int64_t threads) : Upfirdn2dPlan{a} {
  const int64_t common = std::gcd(a.up_x, a.down_x);
  phases_out = a.up_x / common;
  phases_in = a.down_x / common;
  for (int64_t r = 0; r < phases_out; ++r) {
    RowPhase phase{(int64_t)tap_table.size(), 0, (a.out_w - r + phases_out - 1) / phases_out, 0, 0};
    phase.last_inside = phase.pixels;
    for (int64_t k = 0; k < a.taps_x; ++k) {
      const int64_t place = r * a.down_x + k - a.pad_x;
      if (place % a.up_x != 0) continue;
      const int64_t pixel = place / a.up_x, offset = floor_div(pixel, phases_in);
      tap_table.push_back({k, pixel - offset * phases_in, offset});
      phase.first_inside = std::max(phase.first_inside, -offset);
      phase.last_inside = std::min(phase.last_inside, floor_div(a.in_w - 1 - pixel, phases_in) + 1);
    }
    phase.last_tap = (int64_t)tap_table.size();
    if (phase.last_inside <= phase.first_inside) phase.first_inside = -1;
    phase_table.push_back(phase);
  }
  taps = tap_table.data();
  phases = phase_table.data();
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
  group = a.channels > 1 ? 1 : std::clamp<int64_t>(2 * kShortRow / split_pixels, 1, a.planes);
  if (split_pixels >= kShortRow) group = 1;
  if (threads > 1) group = std::min(group, (a.planes + threads - 1) / threads);
  groups = (a.planes + group - 1) / group;
  ring_rows = (a.taps_y - 1) / a.up_y + 1;
  by_pixel = a.channels >= kSlack;
  int64_t elements;
  if (by_pixel) {
    // Sums along x for each input row, and what it costs to write and read them, against all products for each output row.
    const int64_t columns = (a.taps_x - 1) / a.up_x + 1;
    if (ring_rows * a.up_y + (columns + 2) * a.down_y < ring_rows * columns * a.up_y) {
      if (a.dtype == DType::f64) factor<double>();
      else factor<float>();
    }
    const int64_t widened = a.dtype == DType::f16 || a.dtype == DType::bf16 ? round_up(a.in_w * a.channels, kSlack) : 0;
    line = row_factor ? round_up(a.out_w * a.channels, kSlack) : widened;
    whole_line = row_factor ? widened : 0;
    elements = ring_rows * line + whole_line;
  } else {
    line = round_up(group * split_pixels * a.channels + kSlack, kSlack);
    whole_line = a.channels > 1 ? 0 : line * std::max(phases_in, phases_out);
    elements = (ring_rows * phases_in + phases_out) * line + 2 * whole_line;
  }
  const int64_t pointers = 4 * ring_rows + ring_rows * a.taps_x;  // slots of the ring, rows and sources of an output row
  scratch_bytes = round_up(element * (elements + ring_rows * a.taps_x) + 8 * pointers, kCacheLine);
}

}  // namespace

void upfirdn2d(const Upfirdn2d& args, const Threads& threads) {
  const OwnedPlan plan(args, threads.count);
  const int64_t rows = plan.groups * args.out_h;
  const int64_t products = plan.group * args.out_w * args.channels * plan.ring_rows * ((args.taps_x - 1) / args.up_x + 1);
  parallel_for(threads, rows, kProductsPerThread / (products + 1) + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(kCacheLine, (size_t)plan.scratch_bytes), std::free);
    if (!scratch) throw std::bad_alloc();
    kernel_table()->upfirdn2d(plan, begin, end, scratch.get());
  });
}

}  // namespace fuseblock::cpu
