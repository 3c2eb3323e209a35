// The CPU kernels for any machine: 16-byte vectors, which are SSE2 on x86-64 and NEON on AArch64.
#define FB_ISA baseline
#define FB_VEC_BYTES 16
#include "isa_kernels.h"

namespace fuseblock::cpu {
extern const KernelTable kernels_baseline;
constexpr KernelTable kernels_baseline = FB_ISA::make_table("baseline");
}  // namespace fuseblock::cpu
