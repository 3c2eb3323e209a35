#include "kernel_table.h"

#include <cstdlib>
#include <cstring>

namespace fuseblock::cpu {

extern const KernelTable kernels_baseline;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2, kernels_avx512;
#endif

namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
#endif

const KernelTable* choose() {
  const char* name = std::getenv("FUSEBLOCK_CPU_ISA");
  const bool any = name == nullptr || *name == 0;
#if defined(__x86_64__)
  if ((any || !std::strcmp(name, "avx512")) && has_avx512()) return &kernels_avx512;
  if ((any || !std::strcmp(name, "avx2")) && has_avx2()) return &kernels_avx2;
#endif
  if (any || !std::strcmp(name, "baseline")) return &kernels_baseline;
  return nullptr;
}

}  // namespace

const KernelTable* kernel_table() {
  static const KernelTable* const table = choose();
  return table;
}

}  // namespace fuseblock::cpu
