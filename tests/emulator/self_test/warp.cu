// Self-tests of mma.h and async_copy.h. nvcc compiles this file too.
#include "warp.h"

#include "cuda/async_copy.h"
#include "cuda/mma.h"
#include "cuda/named_barrier.h"

namespace {

using namespace fuseblock;

constexpr int kTile = 128;

// One warp. Rows of 16 bytes are loaded as the matrices of ldmatrix; b row major needs it transposed.
template <class T, bool kTransposed>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  FB_SHARED(uint4, tiles, [48]);  // 32 rows of 16 bytes of a, 16 of b
  T* const shared_a = reinterpret_cast<T*>(tiles);
  T* const shared_b = reinterpret_cast<T*>(tiles + 32);
  const int lane = threadIdx.x;
  copy_async<16>(shared_a + lane * 8, a + lane * 8);
  if (lane < 16) copy_async<16>(shared_b + lane * 8, b + lane * 8);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix<4>(a_fragment, shared_a + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kTransposed) {
    ldmatrix<2>(b_fragment, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
  } else {
    uint32_t half[1];
    ldmatrix_transposed<1>(half, shared_b + lane % 8 * 8);
    b_fragment[0] = half[0];
    ldmatrix<1>(half, shared_b + (lane % 8 + 8) * 8);
    b_fragment[1] = movmatrix_transposed(half[0]);
  }
  float sums[4] = {};
  mma_m16n8k16<T>(sums, a_fragment, b_fragment);
  for (int n = 0; n < 4; ++n) c[(lane / 4 + n / 2 * 8) * 8 + lane % 4 * 2 + n % 2] = sums[n];
}

template <bool kRound>
__global__ void product_tf32_kernel(const float* a, const float* b, float* c) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  const auto bits = [](float x) { return kRound ? round_to_tf32(x) : __float_as_uint(x); };
  uint32_t a_fragment[4], b_fragment[2];
  for (int n = 0; n < 4; ++n) a_fragment[n] = bits(a[(group + n % 2 * 8) * 8 + pair + n / 2 * 4]);
  for (int n = 0; n < 2; ++n) b_fragment[n] = bits(b[group * 8 + pair + n * 4]);
  float sums[4] = {};
  mma_m16n8k8_tf32(sums, a_fragment, b_fragment);
  for (int n = 0; n < 4; ++n) c[(group + n / 2 * 8) * 8 + pair * 2 + n % 2] = sums[n];
}

__global__ void transpose_kernel(const uint16_t* x, uint16_t* y) {
  FB_SHARED(uint4, rows, [8]);
  if (threadIdx.x < 8) rows[threadIdx.x] = reinterpret_cast<const uint4*>(x)[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_transposed<4>(r, rows + threadIdx.x % 8);
  reinterpret_cast<uint32_t*>(y)[threadIdx.x] = r[3];
}

// Tile t + 1 is copied while tile t is summed up. Thread n copies the four elements that thread n + 1 sums up.
template <int kMistake>
__global__ void stream_kernel(const float* x, float* y, int count, int tiles) {
  FB_SHARED(float4, buffer, [2][kTile / 4]);
  const int copies = (threadIdx.x + 31) % 32;
  const auto fetch = [&](int t) {
    const int start = t * kTile + copies * 4, left = count - start;
    const uint32_t bytes = left <= 0 ? 0 : (left < 4 ? left * 4 : 16);
    float* const to = reinterpret_cast<float*>(&buffer[t % 2][copies]) + (kMistake == kCopyMisaligned ? 1 : 0);
    copy_async_or_zero<16>(kMistake == kCopyOutside ? y : to, x + (bytes == 0 ? 0 : start), bytes);
    copy_async_commit();
  };
  float4 sum = {0, 0, 0, 0};
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles || kMistake == kCopyLeft) {
      fetch(t + 1);
    } else {
      copy_async_commit();
    }
    if (kMistake == kCopyWaitsForTooFew) {
      copy_async_wait<2>();
    } else if (kMistake != kCopyWithoutWait) {
      copy_async_wait<1>();
    }
    if (kMistake != kCopyWithoutBarrier) __syncthreads();
    const float4 v = buffer[t % 2][threadIdx.x];
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    __syncthreads();
  }
  if (kMistake != kCopyLeft) copy_async_wait_all();
  reinterpret_cast<float4*>(y)[threadIdx.x] = sum;
}

// Barrier 1: a value is there, barrier 2: it has been read. Warp 3 has nothing to do with it.
template <int kMistake>
__global__ void producer_kernel(int* y, int rounds) {
  FB_SHARED(int, value, [32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = 0;
  for (int n = 0; n < rounds; ++n) {
    if (warp == 0) {
      if (n > 0 && kMistake != kBarrierMissing) named_barrier_sync(2, 96);
      value[lane] = n;
      named_barrier_arrive(1, 96);
    } else if (warp < 3) {
      named_barrier_sync(1, kMistake == kUnequalCounts ? 64 : 96);
      sum += value[31 - lane];
      if (n + 1 < rounds && (kMistake != kMissingArrival || warp != 2)) named_barrier_arrive(2, 96);
    }
  }
  if (warp == 1 || warp == 2) y[threadIdx.x - 32] = sum;
}

}  // namespace

template <class T>
static void product(const void* a, const void* b, float* c, bool transposed, void* stream) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
  if (transposed) {
    FB_LAUNCH((product_kernel<T, true>), dim3(1), dim3(32), 0, stream, x, y, c);
  } else {
    FB_LAUNCH((product_kernel<T, false>), dim3(1), dim3(32), 0, stream, x, y, c);
  }
}

int launch_product(const void* a, const void* b, float* c, bool is_bfloat16, bool transposed, void* stream) {
  if (is_bfloat16) {
    product<__nv_bfloat16>(a, b, c, transposed, stream);
  } else {
    product<__half>(a, b, c, transposed, stream);
  }
  return cudaGetLastError();
}

int launch_product_tf32(const float* a, const float* b, float* c, bool round, void* stream) {
  if (round) {
    FB_LAUNCH((product_tf32_kernel<true>), dim3(1), dim3(32), 0, stream, a, b, c);
  } else {
    FB_LAUNCH((product_tf32_kernel<false>), dim3(1), dim3(32), 0, stream, a, b, c);
  }
  return cudaGetLastError();
}

int launch_transpose(const unsigned short* x, unsigned short* y, void* stream) {
  FB_LAUNCH((transpose_kernel), dim3(1), dim3(32), 0, stream, x, y);
  return cudaGetLastError();
}

int launch_stream(const float* x, float* y, int count, int tiles, int mistake, void* stream) {
#define CASE(which)                                                                                          \
  case which:                                                                                                \
    FB_LAUNCH((stream_kernel<which>), dim3(1), dim3(kTile / 4), 0, stream, x, y, count, tiles);              \
    break
  switch (mistake) {
    CASE(kNoWarpMistake);
    CASE(kCopyWithoutWait);
    CASE(kCopyWaitsForTooFew);
    CASE(kCopyWithoutBarrier);
    CASE(kCopyMisaligned);
    CASE(kCopyOutside);
    CASE(kCopyLeft);
  }
#undef CASE
  return cudaGetLastError();
}

int launch_producer(int* y, int rounds, int mistake, void* stream) {
  if (mistake == kMissingArrival) {
    FB_LAUNCH((producer_kernel<kMissingArrival>), dim3(1), dim3(128), 0, stream, y, rounds);
  } else if (mistake == kUnequalCounts) {
    FB_LAUNCH((producer_kernel<kUnequalCounts>), dim3(1), dim3(128), 0, stream, y, rounds);
  } else if (mistake == kBarrierMissing) {
    FB_LAUNCH((producer_kernel<kBarrierMissing>), dim3(1), dim3(128), 0, stream, y, rounds);
  } else {
    FB_LAUNCH((producer_kernel<kNoBarrierMistake>), dim3(1), dim3(128), 0, stream, y, rounds);
  }
  return cudaGetLastError();
}
