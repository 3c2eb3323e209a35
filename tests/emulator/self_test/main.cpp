// Runs self-tests: `self_test NAME [SEED [SEEDS]]`. Prints what the kernel computed, or the emulator's complaint; then
// exits 1.
// With SEEDS it is run with that many seeds, up to the first complaint.
#include <cstdio>
#include <stdexcept>

#include "cases.h"
#include "cuda/launch.h"

int main(int argc, char** argv) {
  Cases cases;
  add_basic_cases(cases);
  add_warp_cases(cases);
  add_cluster_cases(cases);
  add_grid_cases(cases);
  const auto found = cases.find(argc > 1 ? argv[1] : "");
  if (found == cases.end()) {
    std::printf("no self-test is called so\n");
    return 2;
  }
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::stoul(argv[2])) : 0;
  const unsigned seeds = argc > 3 ? static_cast<unsigned>(std::stoul(argv[3])) : 1;
  for (unsigned n = seed; n < seed + seeds; ++n) {
    cuda_emulator::set_seed(n);
    try {
      found->second();
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  return 0;
}
