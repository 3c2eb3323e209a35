// spectral_norm for x86-64-v4. Headers of the standard library and of the compiler stay outside of the target region.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#define FB_ISA avx512
#define FB_VEC_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif

#include "spectral_norm_kernels.h"

namespace fuseblock::cpu {
extern const SpectralKernels spectral_kernels_avx512;
constexpr SpectralKernels spectral_kernels_avx512 = FB_ISA::spectral_kernels();
}  // namespace fuseblock::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
