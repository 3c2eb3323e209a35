// Runs CUDA kernels on the CPU, for tests: the same source that nvcc compiles, compiled by g++ (csrc/cuda/launch.h).
//
// Every CUDA thread is a fiber. The blocks that must run together (a cluster, the grid of a cooperative launch) share an OS
// thread, so that set_seed() decides in which order everything happens: warps and their lanes take turns in an order that is
// shuffled in every round, one block may be kept behind the others, and what is copied asynchronously arrives sooner or
// later (seed 0: threads in order, copies as late as possible).
//
// Checked: barriers that not all threads reach, different collectives that meet, lanes outside of their mask, shuffles from
// lanes that do not take part, grid.sync() in an ordinary launch, waits that never end (with what is missing), too much
// shared memory, addresses outside of shared memory or misaligned for an instruction, access to a block of the cluster
// that may not have started yet or has returned, copies still under way when a thread returns, mbarriers that are
// overwritten, not initialised, arrived at too often or passed twice before a waiting thread saw it, fences for mbarriers
// and bulk copies that a block lacks altogether.
// Misaligned accesses trap (a flag of the compiler). Shared memory starts as NaN (all bits set). With AddressSanitizer
// shared arrays have red zones; with ThreadSanitizer only barriers and atomics order memory, so that missing ones are
// reported.
//
// Stricter than hardware: a thread that has returned counts as missing at a barrier and in a mask. Not modelled: speed,
// memory ordering weaker than the host's (but for remote stores and asynchronous copies), device math
// functions (libm's are used). A thread that spins until another one has done something must call __nanosleep().
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

#include "cuda/placement.h"

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
  unsigned cluster_rank, cluster_size;
};
extern thread_local const ThreadInfo* current;

void block_barrier();
// All lanes of `mask` must come, with the same `operation`.
void warp_barrier(unsigned mask, const char* operation);
// The same; `perform` is called once, by the lane that comes last, with what every lane of the mask has brought.
using Perform = void (*)(void* const* lanes, unsigned mask);
void warp_collective(unsigned mask, const char* operation, void* mine, Perform perform);
void grid_barrier();
// Lets other threads run.
void yield();
// Sleeps until *counter, whose value wraps around, has reached target.
void wait_for_count(const unsigned* counter, unsigned target);
// What orders memory: remote stores of this thread have arrived afterwards.
void memory_fence();
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
// Stops the launch; the launching call throws std::runtime_error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned cluster = 1;       // blocks, along x
  bool much_shared = false;  // more than 48 KB of dynamic shared memory were asked for as they must be
};
// Runs `thread` once per CUDA thread; returns when the grid is done. Throws std::runtime_error.
void launch(const LaunchConfig& config, const std::function<void()>& thread);
// The same under the limits of device.h, which give an error.
cudaError_t launch_placed(const fuseblock::Placement& placement, dim3 grid, dim3 block, size_t shared_bytes,
                          const std::function<void()>& thread);
fuseblock::Residency resident_blocks(const fuseblock::Placement& placement, dim3 block, size_t shared_bytes);

struct LaunchShape {
  dim3 grid, block;
};
// Of the launch that started last.
LaunchShape last_launch();

// 0: threads take turns in order; else their order is shuffled anew in every round.
void set_seed(unsigned seed);
// OS threads of a launch; cooperative launches have one.
void set_workers(int workers);

// v as lane `source` of the warp has it. All lanes of mask take part.
template <class T>
T exchange(unsigned mask, T v, unsigned source, const char* operation) {
  struct Lane {
    T value, result;
    unsigned source;
  };
  if (source >= 32 || (mask >> source & 1) == 0) {
    fail("%s reads lane %u, which is not in its mask 0x%08x", operation, source, mask);
  }
  Lane mine{v, v, source};
  warp_collective(mask, operation, &mine, [](void* const* lanes, unsigned present) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((present >> lane & 1) == 0) continue;
      Lane* reader = static_cast<Lane*>(lanes[lane]);
      // A lane that an odd block's last warp does not have gives what the hardware may give: anything.
      if (present >> reader->source & 1) reader->result = static_cast<Lane*>(lanes[reader->source])->value;
    }
  });
  return mine.result;
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
inline void __threadfence() {
  cuda_emulator::memory_fence();
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() { __threadfence(); }
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
  struct Lane {
    int predicate;
    unsigned votes;
  } mine{predicate, 0};
  cuda_emulator::warp_collective(mask, "__ballot_sync", &mine, [](void* const* lanes, unsigned present) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (present >> lane & 1 && static_cast<Lane*>(lanes[lane])->predicate != 0) votes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (present >> lane & 1) static_cast<Lane*>(lanes[lane])->votes = votes;
    }
  });
  return mine.votes;
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

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

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
