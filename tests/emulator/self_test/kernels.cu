// Small kernels that use every facility of the emulator, and broken twins of them. nvcc compiles this file too.
//
// kBroken makes the named mistake; the same template without it is right.
#include "cuda/mma.h"
#include "kernels.h"

#if !defined(FUSEBLOCK_EMULATE_CUDA)  // the emulator brings its own
#include <cooperative_groups.h>
#endif

namespace cg = cooperative_groups;

namespace {

// y = sum of x, by shuffles within warps and shared memory between them.
template <bool kMissingBarrier, bool kOutOfBounds>
__global__ void block_sum_kernel(const float* x, float* y, int count) {
  FB_SHARED(float, partial, [kBlock / 32]);
  float sum = 0;
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < count; n += gridDim.x * blockDim.x) sum += x[n];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (!kMissingBarrier) __syncthreads();
  if (kOutOfBounds && threadIdx.x == 0) partial[kBlock / 32] = 1;
  if (threadIdx.x == 0) {
    float total = 0;
    for (float part : partial) total += part;
    atomicAdd(y, total);
  }
}

// x[t + 1] = 1 + the left neighbour's x[t], around a ring that is spread over the whole grid.
template <bool kMissingGridBarrier>
__global__ void ring_kernel(float* x, int steps) {
  const int size = gridDim.x * blockDim.x;
  const int me = blockIdx.x * blockDim.x + threadIdx.x;
  FB_DYNAMIC_SHARED(float, buffer);
  for (int t = 0; t < steps; ++t) {
    buffer[threadIdx.x] = x[t * size + (me + size - 1) % size];
    __syncthreads();
    x[(t + 1) * size + me] = 1 + buffer[threadIdx.x];
    if (kMissingGridBarrier) {
      __syncthreads();
    } else {
      cg::this_grid().sync();
    }
  }
}

// One warp: c (16, 8) += a (16, 16) b (8, 16)^T.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  const auto pair = [](const T* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const uint32_t a_fragment[4] = {pair(a + row * 16 + column), pair(a + (row + 8) * 16 + column),
                                  pair(a + row * 16 + column + 8), pair(a + (row + 8) * 16 + column + 8)};
  const uint32_t b_fragment[2] = {pair(b + row * 16 + column), pair(b + row * 16 + column + 8)};
  float sums[4] = {c[row * 8 + column], c[row * 8 + column + 1], c[(row + 8) * 8 + column], c[(row + 8) * 8 + column + 1]};
  fuseblock::mma_m16n8k16<T>(sums, a_fragment, b_fragment);
  for (int n = 0; n < 4; ++n) c[(row + n / 2 * 8) * 8 + column + n % 2] = sums[n];
}

// Each half of the warp turns its values around by itself: two masks in use at the same time.
__global__ void half_warps_kernel(int* x, unsigned* votes) {
  const unsigned lane = threadIdx.x % 32;
  if (lane < 16) {
    x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 15);
  } else {
    x[threadIdx.x] = __shfl_sync(0xffff0000u, x[threadIdx.x], 47 - lane);
  }
  __syncwarp();
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, lane % 3 == 0);
}

__global__ void divergent_barrier_kernel(float* y) {
  if (threadIdx.x < 16) __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void divergent_collectives_kernel(int* x) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    x[threadIdx.x] = __shfl_sync(0xffffffffu, x[threadIdx.x], 0);
  }
}

__global__ void foreign_mask_kernel(int* x) { x[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0); }

__global__ void source_outside_kernel(int* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_down_sync(0x0000ffffu, x[threadIdx.x], 8);
}

// One thread per element of y, in the order in which the threads ran.
__global__ void order_kernel(int* y, int* counter) { y[threadIdx.x] = atomicAdd(counter, 1); }

}  // namespace

int launch_block_sum(const float* x, float* y, int count, int mistake, void* stream) {
  if (mistake == kMissingBarrier) {
    FB_LAUNCH((block_sum_kernel<true, false>), dim3(2), dim3(kBlock), 0, stream, x, y, count);
  } else if (mistake == kOutOfBounds) {
    FB_LAUNCH((block_sum_kernel<false, true>), dim3(2), dim3(kBlock), 0, stream, x, y, count);
  } else {
    FB_LAUNCH((block_sum_kernel<false, false>), dim3(2), dim3(kBlock), 0, stream, x, y, count);
  }
  return cudaGetLastError();
}

int launch_ring(float* x, int blocks, int threads, int steps, int mistake, void* stream) {
  const size_t bytes = threads * sizeof(float);
  if (mistake == kMissingGridBarrier) {
    FB_LAUNCH_COOPERATIVE((ring_kernel<true>), dim3(blocks), dim3(threads), bytes, stream, x, steps);
  } else if (mistake == kOrdinaryLaunch) {
    FB_LAUNCH((ring_kernel<false>), dim3(blocks), dim3(threads), bytes, stream, x, steps);
  } else {
    FB_LAUNCH_COOPERATIVE((ring_kernel<false>), dim3(blocks), dim3(threads), bytes, stream, x, steps);
  }
  return cudaGetLastError();
}

int launch_mma(const void* a, const void* b, float* c, bool is_bfloat16, void* stream) {
  if (is_bfloat16) {
    FB_LAUNCH((mma_kernel<__nv_bfloat16>), dim3(1), dim3(32), 0, stream, static_cast<const __nv_bfloat16*>(a),
              static_cast<const __nv_bfloat16*>(b), c);
  } else {
    FB_LAUNCH((mma_kernel<__half>), dim3(1), dim3(32), 0, stream, static_cast<const __half*>(a),
              static_cast<const __half*>(b), c);
  }
  return cudaGetLastError();
}

int launch_half_warps(int* x, unsigned* votes, int threads, void* stream) {
  FB_LAUNCH((half_warps_kernel), dim3(1), dim3(threads), 0, stream, x, votes);
  return cudaGetLastError();
}

int launch_mistake(int* x, int mistake, void* stream) {
  if (mistake == kDivergentBarrier) {
    FB_LAUNCH((divergent_barrier_kernel), dim3(1), dim3(32), 0, stream, reinterpret_cast<float*>(x));
  } else if (mistake == kDivergentCollectives) {
    FB_LAUNCH((divergent_collectives_kernel), dim3(1), dim3(32), 0, stream, x);
  } else if (mistake == kForeignMask) {
    FB_LAUNCH((foreign_mask_kernel), dim3(1), dim3(32), 0, stream, x);
  } else {
    FB_LAUNCH((source_outside_kernel), dim3(1), dim3(32), 0, stream, x);
  }
  return cudaGetLastError();
}

int launch_order(int* y, int* counter, int threads, void* stream) {
  FB_LAUNCH((order_kernel), dim3(1), dim3(threads), 0, stream, y, counter);
  return cudaGetLastError();
}
