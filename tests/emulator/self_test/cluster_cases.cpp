// Self-tests of clusters against the same recurrence on the host.
#include <cstdio>
#include <vector>

#include "cases.h"
#include "cluster.h"
#include "cuda/launch.h"
#include "device.h"

namespace {

void check(int error) {
  if (error != 0) std::printf("error %d\n", error);
}

void gather(int cluster, int steps, int transport, int mistake) {
  constexpr int clusters = 2;
  const int size = cluster * kSlice;
  std::vector<float> y(clusters * steps * size, -1.f), h(size), next(size);
  check(launch_gather(y.data(), cluster, clusters, steps, transport, mistake, nullptr));
  bool right = true;
  for (int n = 0; n < size; ++n) h[n] = static_cast<float>(n);
  for (int t = 0; t < steps; ++t, h = next) {
    for (int unit = 0; unit < size; ++unit) {
      float sum = 0;
      for (int n = 0; n < size; ++n) sum += h[n] * static_cast<float>((n + unit) % 5 + 1);
      next[unit] = sum - static_cast<float>(static_cast<int>(sum / 97) * 97);
      for (int c = 0; c < clusters; ++c) right = right && y[(c * steps + t) * size + unit] == next[unit];
    }
  }
  std::printf("%s\n", right ? "right" : "wrong");
}

void multicast(bool wait) {
  constexpr int cluster = 4, blocks = 8;
  alignas(16) float x[64], y[blocks * 64] = {};
  for (int n = 0; n < 64; ++n) x[n] = static_cast<float>(n);
  check(launch_multicast(x, y, cluster, blocks, wait, nullptr));
  bool right = true;
  for (int n = 0; n < blocks * 64; ++n) right = right && y[n] == static_cast<float>(n % 64 + n / 64 % cluster);
  std::printf("%s\n", right ? "right" : "wrong");
}

void resident(const cuda_emulator::Device& device, int cluster, bool cooperative, int shared_bytes) {
  cuda_emulator::set_device(device);
  const char* refusal = nullptr;
  const int blocks = resident_gather(cluster, cooperative, shared_bytes, &refusal);
  std::printf("%d %s\n", blocks, refusal == nullptr ? "" : refusal);
  float y[16 * kSlice] = {};
  if (!cooperative && shared_bytes == 0) check(launch_gather(y, cluster, 1, 1, kBulk, kNoClusterMistake, nullptr));
}

}  // namespace

void add_cluster_cases(Cases& cases) {
  cases["gather_bulk"] = [] { gather(4, 9, kBulk, kNoClusterMistake); };
  cases["gather_bulk_16"] = [] { gather(16, 5, kBulk, kNoClusterMistake); };
  cases["gather_bulk_1"] = [] { gather(1, 4, kBulk, kNoClusterMistake); };
  cases["gather_store_async"] = [] { gather(4, 9, kStoreAsync, kNoClusterMistake); };
  cases["gather_store_and_arrive"] = [] { gather(4, 9, kStoreAndArrive, kNoClusterMistake); };
  cases["gather_store_and_barrier"] = [] { gather(4, 9, kStoreAndBarrier, kNoClusterMistake); };
  const std::pair<const char*, int> mistakes[] = {
      {"no_wait", kNoWait},
      {"wrong_parity", kWrongParity},
      {"single_buffer", kSingleBuffer},
      {"single_stage", kSingleStage},
      {"no_arrive", kNoArrive},
      {"too_few_bytes", kTooFewBytes},
      {"too_many_bytes", kTooManyBytes},
      {"early_exit", kEarlyExit},
      {"no_start", kNoStart},
      {"foreign_mbarrier", kForeignMBarrier},
      {"arrive_twice", kArriveTwice},
      {"init_twice", kInitTwice},
      {"not_initialised", kNotInitialised},
      {"overwritten", kOverwritten},
      {"beyond", kBeyond},
      {"odd_size", kOddSize},
      {"no_such_block", kNoSuchBlock},
      {"unpaired", kUnpaired},
      {"no_init_fence", kNoInitFence},
      {"no_proxy_fence", kNoProxyFence},
  };
  for (const auto& [name, mistake] : mistakes) {
    cases[name] = [mistake = mistake] { gather(4, 9, kBulk, mistake); };
  }
  cases["multicast"] = [] { multicast(true); };
  cases["multicast_left"] = [] { multicast(false); };
  cases["resident_h200"] = [] { resident({}, 16, false, 0); };
  cases["resident_shared"] = [] { resident({}, 8, false, 200 << 10); };
  cases["resident_small"] = [] { resident({.multiprocessors = 14, .neighbours = 14}, 16, false, 160 << 10); };
  cases["resident_a100"] = [] { resident({.clusters = false, .multiprocessors = 108}, 2, false, 0); };
  cases["resident_alone"] = [] { resident({.cooperative = false}, 1, true, 0); };
  cases["resident_much"] = [] { resident({.shared_bytes = 99 << 10}, 1, true, 100 << 10); };
  cases["resident_cooperative"] = [] { resident({}, 1, true, 100 << 10); };
}
