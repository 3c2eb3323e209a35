// spectral_norm for any machine: 16-byte vectors, which are SSE2 on x86-64 and NEON on AArch64.
#define FB_ISA baseline
#define FB_VEC_BYTES 16
#include "spectral_norm_kernels.h"

namespace fuseblock::cpu {
extern const SpectralKernels spectral_kernels_baseline;
constexpr SpectralKernels spectral_kernels_baseline = FB_ISA::spectral_kernels();
}  // namespace fuseblock::cpu
