// spectral_norm for x86-64-v3. Headers of the standard library and of the compiler stay outside of the target region.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#define FB_ISA avx2
#define FB_VEC_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif

#include "spectral_norm_kernels.h"

namespace fuseblock::cpu {
extern const SpectralKernels spectral_kernels_avx2;
constexpr SpectralKernels spectral_kernels_avx2 = FB_ISA::spectral_kernels();
}  // namespace fuseblock::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
