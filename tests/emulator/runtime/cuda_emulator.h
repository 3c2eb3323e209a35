// Runs CUDA kernels on the CPU, for tests: the same source that nvcc compiles, compiled by g++ (csrc/cuda/launch.h).
//
// Every CUDA thread is a fiber, every block in flight an OS thread. Checked: barriers that not all threads reach,
// different collectives that meet, lanes outside of their mask, shuffles from lanes that do not take part, grid.sync() in
// an ordinary launch, too much shared memory. Misaligned accesses trap (a flag of the compiler). Shared memory starts as
// NaN (all bits set). Threads of a block take turns in an order that set_seed() shuffles. With AddressSanitizer shared arrays have red zones; with ThreadSanitizer only
// barriers and atomics order memory, so that missing ones are reported.
//
// Stricter than hardware: a thread that has returned counts as missing at a barrier and in a mask. Not modelled: speed,
// memory ordering weaker than the host's, device math functions (libm's are used). A thread that spins until another of
// its own block has done something must call __nanosleep().
//
// Types and conversions of float16 and bfloat16 are CUDA's own headers'.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_emulator {

// What kernel code may read about the running thread.
struct ThreadInfo {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane;        // in its warp
  unsigned warp_lanes;  // lanes that the warp has: fewer than 32 at the end of an odd block
};
extern thread_local const ThreadInfo* current;

inline constexpr size_t kLaneSlotBytes = 64;

void block_barrier();
// All lanes of `mask` must come, with the same `operation`.
void warp_barrier(unsigned mask, const char* operation);
void grid_barrier();
// Lets the other threads of the block run.
void yield();
// Memory through which the lanes of the calling thread's warp exchange values.
void* lane_slot(unsigned lane);
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
// Stops the launch; the launching call throws std::runtime_error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs `thread` once per CUDA thread; returns when the grid is done. Throws std::runtime_error.
void launch(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, const std::function<void()>& thread);

struct LaunchShape {
  dim3 grid, block;
};
// Of the launch that started last.
LaunchShape last_launch();

// 0: threads take turns in order; else their order is shuffled anew in every round.
void set_seed(unsigned seed);
// OS threads of ordinary launches. Cooperative launches have one per block.
void set_workers(int workers);

// v as lane `source` of the warp has it. All lanes of mask take part.
template <class T>
T exchange(unsigned mask, T v, unsigned source, const char* operation) {
  static_assert(sizeof(T) <= kLaneSlotBytes && std::is_trivially_copyable_v<T>);
  std::memcpy(lane_slot(current->lane), &v, sizeof(T));
  warp_barrier(mask, operation);
  if (source >= 32 || (mask >> source & 1) == 0) {
    fail("%s reads lane %u, which is not in its mask 0x%08x", operation, source, mask);
  }
  std::memcpy(&v, lane_slot(source), sizeof(T));
  warp_barrier(mask, operation);
  return v;
}

// Compare-and-swap loop on the bits of *address, for types without an atomic instruction of their own.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED), new_bits;
  T old_value;
  do {
    std::memcpy(&old_value, &old_bits, sizeof(T));
    const T new_value = update(old_value);
    std::memcpy(&new_bits, &new_value, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &old_bits, new_bits, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return old_value;
}

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::current->thread)
#define blockIdx (::cuda_emulator::current->block)
#define blockDim (::cuda_emulator::current->block_size)
#define gridDim (::cuda_emulator::current->grid_size)
#define warpSize 32

inline void __syncthreads() { cuda_emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::warp_barrier(mask, "__syncwarp"); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { cuda_emulator::yield(); }

// Shuffles within segments of `width` lanes, width a power of two. As on the device, a lane whose source would lie beyond
// its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const unsigned segment = cuda_emulator::current->lane & ~(width - 1u);
  return cuda_emulator::exchange(mask, v, segment + (source & (width - 1u)), "__shfl_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned lane = cuda_emulator::current->lane;
  const bool inside = (lane & (width - 1u)) + delta < static_cast<unsigned>(width);
  return cuda_emulator::exchange(mask, v, inside ? lane + delta : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned lane = cuda_emulator::current->lane;
  const bool inside = (lane & (width - 1u)) >= delta;
  return cuda_emulator::exchange(mask, v, inside ? lane - delta : lane, "__shfl_up_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32) {
  const unsigned lane = cuda_emulator::current->lane, source = lane ^ lane_mask;
  const bool inside = source / width <= lane / width;
  return cuda_emulator::exchange(mask, v, inside ? source : lane, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  std::memcpy(cuda_emulator::lane_slot(cuda_emulator::current->lane), &predicate, sizeof(int));
  cuda_emulator::warp_barrier(mask, "__ballot_sync");
  unsigned votes = 0;
  for (unsigned lane = 0; lane < cuda_emulator::current->warp_lanes; ++lane) {
    int vote = 0;
    if (mask >> lane & 1) std::memcpy(&vote, cuda_emulator::lane_slot(lane), sizeof(int));
    votes |= (vote != 0 ? 1u : 0u) << lane;
  }
  cuda_emulator::warp_barrier(mask, "__ballot_sync");
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
inline float atomicAdd(float* p, float v) {
  return cuda_emulator::atomic_update(p, [v](float old) { return old + v; });
}
inline double atomicAdd(double* p, double v) {
  return cuda_emulator::atomic_update(p, [v](double old) { return old + v; });
}
inline int atomicMax(int* p, int v) {
  return cuda_emulator::atomic_update(p, [v](int old) { return old < v ? v : old; });
}
inline unsigned atomicExch(unsigned* p, unsigned v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

namespace cooperative_groups {

struct grid_group {
  void sync() const { cuda_emulator::grid_barrier(); }
  unsigned long long size() const {
    return 1ull * gridDim.x * gridDim.y * gridDim.z * blockDim.x * blockDim.y * blockDim.z;
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

namespace fuseblock {

// d = a b + c of mma.sync.aligned.m16n8k16.row.col with float32 accumulation; T: __half or __nv_bfloat16. Fragments lie in
// registers as the PTX ISA says. One lane does the sums of the whole warp; products are exact, additions in order of k.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Slot {
    T a[8], b[4];
    float c[4];
  };
  static_assert(sizeof(Slot) <= cuda_emulator::kLaneSlotBytes);
  const auto slot = [](unsigned lane) { return static_cast<Slot*>(cuda_emulator::lane_slot(lane)); };
  const unsigned lane = cuda_emulator::current->lane;
  std::memcpy(&slot(lane)->a, a, sizeof(a));
  std::memcpy(&slot(lane)->b, b, sizeof(b));
  std::memcpy(&slot(lane)->c, c, sizeof(c));
  cuda_emulator::warp_barrier(0xffffffffu, "mma_m16n8k16");
  if (lane == 0) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& sum = slot(row % 8 * 4 + column / 2)->c[row / 8 * 2 + column % 2];
        for (int k = 0; k < 16; ++k) {
          const T x = slot(row % 8 * 4 + k % 8 / 2)->a[k / 8 * 4 + row / 8 * 2 + k % 2];
          const T y = slot(column * 4 + k % 8 / 2)->b[k / 8 * 2 + k % 2];
          sum += static_cast<float>(x) * static_cast<float>(y);
        }
      }
    }
  }
  cuda_emulator::warp_barrier(0xffffffffu, "mma_m16n8k16");
  std::memcpy(c, &slot(lane)->c, sizeof(c));
  cuda_emulator::warp_barrier(0xffffffffu, "mma_m16n8k16");
}

}  // namespace fuseblock
