// Self-tests of matrix products and asynchronous copies against plain loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cases.h"
#include "cuda/launch.h"
#include "warp.h"

namespace {

float largest_difference(const std::vector<float>& x, const std::vector<float>& y) {
  float error = 0;
  for (size_t n = 0; n < x.size(); ++n) {
    if (!(std::abs(x[n] - y[n]) <= error)) error = std::abs(x[n] - y[n]);
  }
  return error;
}

// Small integers, so that every sum is exact.
template <class T>
void product(bool is_bfloat16, bool transposed) {
  std::vector<T> a(16 * 16), b(16 * 8);
  for (size_t n = 0; n < a.size(); ++n) a[n] = T(static_cast<float>(n * 7 % 23) - 11);
  for (size_t n = 0; n < b.size(); ++n) b[n] = T(static_cast<float>(n * 5 % 19) - 9);
  std::vector<float> c(16 * 8, -1.f), want(16 * 8, 0.f);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < 16; ++k) {
        const T y = transposed ? b[column * 16 + k] : b[k * 8 + column];
        want[row * 8 + column] += static_cast<float>(a[row * 16 + k]) * static_cast<float>(y);
      }
    }
  }
  launch_product(a.data(), b.data(), c.data(), is_bfloat16, transposed, nullptr);
  std::printf("%g\n", largest_difference(c, want));
}

// The nearest TF32 number, by arithmetic. `truncated`: the next one towards zero.
float tf32(float x, bool truncated) {
  int exponent;
  const float scaled = std::frexp(x, &exponent) * 2048;  // 11 significant bits
  return std::ldexp(truncated ? std::trunc(scaled) : std::round(scaled), exponent - 11);
}

void product_tf32(bool round) {
  std::vector<float> a(16 * 8), b(8 * 8), c(16 * 8), want(16 * 8, 0.f);
  for (size_t n = 0; n < a.size(); ++n) a[n] = (static_cast<float>(n * 7 % 23) - 11) * 1.0007f;
  for (size_t n = 0; n < b.size(); ++n) b[n] = (static_cast<float>(n * 5 % 19) - 9) / 1024 * 1.0003f;
  a[3] = 1 + 1.f / 2048;  // a tie
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < 8; ++k) want[row * 8 + column] += tf32(a[row * 8 + k], !round) * tf32(b[column * 8 + k], !round);
    }
  }
  launch_product_tf32(a.data(), b.data(), c.data(), round, nullptr);
  std::printf("%g\n", largest_difference(c, want));
}

void transpose() {
  alignas(16) unsigned short x[64], y[64];
  for (int n = 0; n < 64; ++n) x[n] = static_cast<unsigned short>(1000 + n);
  launch_transpose(x, y, nullptr);
  bool right = true;
  for (int n = 0; n < 64; ++n) right = right && y[n] == x[n % 8 * 8 + n / 8];
  std::printf("%s\n", right ? "transposed" : "wrong");
}

void stream(int mistake) {
  constexpr int count = 7 * 128 - 51;
  alignas(16) float x[count], y[128];
  std::vector<float> want(128, 0.f), got(128);
  for (int n = 0; n < count; ++n) {
    x[n] = static_cast<float>(n % 100 + 1);
    want[n % 128] += x[n];
  }
  launch_stream(x, y, count, 7, mistake, nullptr);
  std::copy(y, y + 128, got.begin());
  std::printf("%s\n", largest_difference(got, want) == 0 ? "right" : "wrong");
}

void producer(int mistake) {
  constexpr int rounds = 9;
  int y[64];
  launch_producer(y, rounds, mistake, nullptr);
  bool right = true;
  for (const int sum : y) right = right && sum == rounds * (rounds - 1) / 2;
  std::printf("%s\n", right ? "right" : "wrong");
}

}  // namespace

void add_warp_cases(Cases& cases) {
  cases["product_half"] = [] { product<__half>(false, true); };
  cases["product_half_row_major"] = [] { product<__half>(false, false); };
  cases["product_bfloat16"] = [] { product<__nv_bfloat16>(true, true); };
  cases["product_bfloat16_row_major"] = [] { product<__nv_bfloat16>(true, false); };
  cases["product_tf32"] = [] { product_tf32(true); };
  cases["product_tf32_truncated"] = [] { product_tf32(false); };
  cases["transpose"] = [] { transpose(); };
  cases["stream"] = [] { stream(kNoWarpMistake); };
  cases["producer"] = [] { producer(kNoBarrierMistake); };
  cases["producer_missing_arrival"] = [] { producer(kMissingArrival); };
  cases["producer_unequal_counts"] = [] { producer(kUnequalCounts); };
  cases["producer_barrier_missing"] = [] { producer(kBarrierMissing); };
  cases["copy_without_wait"] = [] { stream(kCopyWithoutWait); };
  cases["copy_waits_for_too_few"] = [] { stream(kCopyWaitsForTooFew); };
  cases["copy_without_barrier"] = [] { stream(kCopyWithoutBarrier); };
  cases["copy_misaligned"] = [] { stream(kCopyMisaligned); };
  cases["copy_outside"] = [] { stream(kCopyOutside); };
  cases["copy_left"] = [] { stream(kCopyLeft); };
}
