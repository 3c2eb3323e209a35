// batch_norm_act for any machine: 16-byte vectors, which are SSE2 on x86-64 and NEON on AArch64.
#define FB_ISA baseline
#define FB_VEC_BYTES 16
#include "batch_norm_act_kernels.h"

namespace fuseblock::cpu {
extern const NormKernels norm_kernels_baseline;
constexpr NormKernels norm_kernels_baseline = FB_ISA::norm_kernels();
}  // namespace fuseblock::cpu
