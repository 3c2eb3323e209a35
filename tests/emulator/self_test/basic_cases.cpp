// Self-tests of barriers, shuffles and one mma.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cases.h"
#include "cuda/launch.h"
#include "kernels.h"

namespace {

void sum(int mistake) {
  std::vector<float> x(1000, 1.f);
  float y = 0;
  launch_block_sum(x.data(), &y, static_cast<int>(x.size()), mistake, nullptr);
  std::printf("%g\n", y);
}

void ring(int mistake) {
  constexpr int blocks = 4, threads = 8, steps = 10;
  std::vector<float> x((steps + 1) * blocks * threads, -1000.f);
  for (int n = 0; n < blocks * threads; ++n) x[n] = 0;
  launch_ring(x.data(), blocks, threads, steps, mistake, nullptr);
  float smallest = 1e9f;
  for (int n = 0; n < blocks * threads; ++n) smallest = std::min(smallest, x[steps * blocks * threads + n]);
  std::printf("%g\n", smallest);
}

// The largest difference from a plain triple loop; values are small integers, so that every sum is exact.
template <class T>
void mma(bool is_bfloat16) {
  std::vector<T> a(16 * 16), b(8 * 16);
  std::vector<float> c(16 * 8);
  for (size_t n = 0; n < a.size(); ++n) a[n] = T(static_cast<float>(n * 7 % 23) - 11);
  for (size_t n = 0; n < b.size(); ++n) b[n] = T(static_cast<float>(n * 5 % 19) - 9);
  for (size_t n = 0; n < c.size(); ++n) c[n] = static_cast<float>(n);
  std::vector<float> want = c;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < 16; ++k) {
        want[row * 8 + column] += static_cast<float>(a[row * 16 + k]) * static_cast<float>(b[column * 16 + k]);
      }
    }
  }
  launch_mma(a.data(), b.data(), c.data(), is_bfloat16, nullptr);
  float error = 0;
  for (size_t n = 0; n < c.size(); ++n) error = std::max(error, std::abs(c[n] - want[n]));
  std::printf("%g\n", error);
}

void half_warps() {
  int x[64];
  unsigned votes[64];
  for (int n = 0; n < 64; ++n) x[n] = n;
  launch_half_warps(x, votes, 64, nullptr);
  for (int n = 0; n < 64; n += 9) std::printf("%d ", x[n]);
  std::printf("%x\n", votes[40]);
}

void order() {
  int y[8], counter = 0;
  launch_order(y, &counter, 8, nullptr);
  for (int value : y) std::printf("%d ", value);
  std::printf("\n");
}

void mistake(int which) {
  int x[32] = {};
  launch_mistake(x, which, nullptr);
}

}  // namespace

void add_basic_cases(Cases& cases) {
  cases["sum"] = [] { sum(kNone); };
  cases["sum_missing_barrier"] = [] { sum(kMissingBarrier); };
  cases["sum_out_of_bounds"] = [] { sum(kOutOfBounds); };
  cases["ring"] = [] { ring(kNone); };
  cases["ring_missing_grid_barrier"] = [] { ring(kMissingGridBarrier); };
  cases["ring_ordinary_launch"] = [] { ring(kOrdinaryLaunch); };
  cases["mma_half"] = [] { mma<__half>(false); };
  cases["mma_bfloat16"] = [] { mma<__nv_bfloat16>(true); };
  cases["half_warps"] = [] { half_warps(); };
  cases["order"] = [] { order(); };
  cases["divergent_barrier"] = [] { mistake(kDivergentBarrier); };
  cases["divergent_collectives"] = [] { mistake(kDivergentCollectives); };
  cases["foreign_mask"] = [] { mistake(kForeignMask); };
  cases["source_outside"] = [] { mistake(kSourceOutside); };
}
