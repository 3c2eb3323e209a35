// Products of 16 x 8 sums by mma, their left operands resident in registers, the right ones by ldmatrix from shared memory: the
// inner loop of the recurrence's kernels by itself.
//
// A warp has 32 resident tiles (128 registers of a thread) in kChains chains of sums that do not depend on each other.
// In bytes, bfloat16 and TF32 look alike: a tile has 16 rows of 32 bytes, an operand 8 rows of 32.
#include "cuda/mma.h"
#include "micro.cuh"

namespace {

using namespace fuseblock;

constexpr int kWarps = 8, kTiles = 32, kTileBytes = 32;

__device__ __forceinline__ void multiply(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<__nv_bfloat16>(c, a, b);
}
__device__ __forceinline__ void multiply(float, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k8_tf32(c, a, b);
}

// Source: A (warps, chains, 16, k) and B (8, k), both with contiguous k. Result: rounds A B^T (blocks, warps, chains, 16, 8).
template <class T, int kChains>
__global__ void __launch_bounds__(kWarps * 32, 1) mma_kernel(const MicroLaunch m) {
  constexpr int kDepth = kTiles / kChains, kRowBytes = kDepth * kTileBytes;
  using Row = uint4[kRowBytes / 16 + 1];  // 16 bytes longer than its content, so that 8 rows start in different banks
  FB_SHARED(Row, rows, [8]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
  const auto* const source = static_cast<const unsigned char*>(m.source);

  uint32_t a[kChains][kDepth][4];
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
    const auto* const tiles = source + static_cast<int64_t>(warp * kChains + chain) * 16 * kRowBytes;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const auto* const at = tiles + (group + n % 2 * 8) * kRowBytes + k * kTileBytes + n / 2 * 16 + pair * 4;
        a[chain][k][n] = *reinterpret_cast<const uint32_t*>(at);
      }
    }
  }
  const auto* const b = reinterpret_cast<const uint4*>(source + static_cast<int64_t>(kWarps) * kChains * 16 * kRowBytes);
  for (int n = threadIdx.x; n < 8 * kRowBytes / 16; n += blockDim.x) rows[n / (kRowBytes / 16)][n % (kRowBytes / 16)] = b[n];

  float sum[kChains][4] = {};
  __syncthreads();
  const Stopwatch watch;
#pragma unroll 1
  for (int t = 0; t < m.rounds; ++t) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 2) {
      uint32_t operands[4];
      ldmatrix(operands, &rows[lane % 8][k * kTileBytes / 16 + lane / 8]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t operand[2] = {operands[2 * n], operands[2 * n + 1]};
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) multiply(T(), sum[chain], a[chain][k + n], operand);
      }
    }
  }
  watch.stop(m);
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
    float* const result = static_cast<float*>(m.result) + ((blockIdx.x * kWarps + warp) * kChains + chain) * 16 * 8;
#pragma unroll
    for (int n = 0; n < 4; ++n) result[(group + n / 2 * 8) * 8 + pair * 2 + n % 2] = sum[chain][n];
  }
}

}  // namespace

FB_MICRO(mma_bfloat16_1, false, (mma_kernel<__nv_bfloat16, 1>))
FB_MICRO(mma_bfloat16_2, false, (mma_kernel<__nv_bfloat16, 2>))
FB_MICRO(mma_bfloat16_4, false, (mma_kernel<__nv_bfloat16, 4>))
FB_MICRO(mma_tf32_1, false, (mma_kernel<float, 1>))
FB_MICRO(mma_tf32_2, false, (mma_kernel<float, 2>))
FB_MICRO(mma_tf32_4, false, (mma_kernel<float, 4>))
