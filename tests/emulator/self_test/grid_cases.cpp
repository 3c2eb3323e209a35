// Self-tests of the grid barrier: three launches, one after the other, on one workspace.
#include <cstdio>
#include <vector>

#include "cases.h"
#include "cuda/launch.h"
#include "device.h"
#include "grid.h"

namespace {

void spread(int blocks, int threads, int steps, int cluster, int mistake) {
  const int size = blocks * threads;
  GridBarrierState barrier{0, 0};
  bool right = true;
  for (int launch = 0; launch < 3; ++launch) {
    std::vector<float> y(steps * size, -1000.f), h(size), next(size);
    if (const int error = launch_spread(y.data(), &barrier, blocks, threads, steps, cluster, mistake, nullptr)) {
      std::printf("error %d\n", error);
      return;
    }
    for (int t = 0; t < steps; ++t, h = next) {
      for (int unit = 0; unit < size; ++unit) {
        float sum = static_cast<float>(unit);
        for (int n = 0; t > 0 && n < size; ++n) sum += h[n] * static_cast<float>((n + unit) % 5 + 1);
        next[unit] = sum - static_cast<float>(static_cast<int>(sum / 97) * 97);
        right = right && y[t * size + unit] == next[unit];
      }
    }
  }
  std::printf("%s\n", right ? "right" : "wrong");
}

}  // namespace

void add_grid_cases(Cases& cases) {
  cases["spread"] = [] { spread(4, 40, 6, 1, kNoGridMistake); };
  cases["spread_many_steps"] = [] { spread(3, 2, 300, 1, kNoGridMistake); };
  cases["spread_clusters"] = [] { spread(4, 8, 6, 2, kNoGridMistake); };
  cases["grid_no_wait"] = [] { spread(4, 40, 6, 1, kGridNoWait); };
  cases["grid_waits_for_too_few"] = [] { spread(4, 40, 6, 1, kGridWaitsForTooFew); };
  cases["grid_no_arrive"] = [] { spread(4, 40, 6, 1, kGridNoArrive); };
  cases["grid_arrive_without_barrier"] = [] { spread(4, 40, 6, 1, kGridArriveWithoutBarrier); };
  cases["grid_no_leave"] = [] { spread(4, 40, 6, 1, kGridNoLeave); };
  cases["grid_leaves_early"] = [] { spread(4, 40, 6, 1, kGridLeavesEarly); };
  cases["grid_ordinary_launch"] = [] { spread(4, 40, 6, 1, kGridOrdinaryLaunch); };
  cases["grid_sleeps_forever"] = [] { spread(4, 40, 6, 1, kGridSleepsForever); };
  cases["grid_too_large"] = [] {
    cuda_emulator::set_device({.multiprocessors = 3, .threads = 64});
    spread(4, 40, 6, 1, kNoGridMistake);
  };
}
