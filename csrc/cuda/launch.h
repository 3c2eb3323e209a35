// How kernels are launched and how they name shared memory, so that one source serves nvcc and the CPU emulator.
//
//   FB_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...)   the parentheses protect the commas
//   FB_LAUNCH_PLACED((kernel), placement, grid, block, shared_bytes, stream, arguments...)   a cudaError_t: clusters,
//                                                    cooperative launches, more than 48 KB of dynamic shared memory
//   FB_LAUNCH_COOPERATIVE(...)                       as FB_LAUNCH, for kernels whose blocks wait for each other
//   FB_RESIDENT_BLOCKS((kernel), placement, block, shared_bytes)   a Residency: how many blocks run at the same time
//   FB_SHARED(float, tile, [4][32]);                 a static shared array
//   FB_DYNAMIC_SHARED(float, buffer);                float* buffer: the dynamic shared memory, aligned to 128 bytes
//
// Kernels and launchers use nothing else of CUDA's syntax extensions beyond the ordinary function qualifiers. PTX stands
// in small device functions, one instruction each, whose emulated twins are in the emulator, so that no kernel has `asm` or
// an `#ifdef` of its own: mma.h, async_copy.h, cluster.h, mbarrier.h, grid_barrier.h.
// With FUSEBLOCK_EMULATE_CUDA the emulator's headers are found on the include path.
#pragma once

#include "cuda/placement.h"

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "cuda_emulator.h"

#define FB_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch({(grid), (block), (shared_bytes)}, [=] { FB_UNWRAP kernel(__VA_ARGS__); })
#define FB_LAUNCH_PLACED(kernel, placement, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch_placed((placement), (grid), (block), (shared_bytes), [=] { FB_UNWRAP kernel(__VA_ARGS__); })
#define FB_RESIDENT_BLOCKS(kernel, placement, block, shared_bytes) \
  ::cuda_emulator::resident_blocks((placement), (block), (shared_bytes))
#define FB_SHARED(type, name, dims)                                                     \
  using name##_shared_type = type dims;                                                 \
  static const char name##_key = 0;                                                     \
  auto& name = *static_cast<name##_shared_type*>(                                       \
      ::cuda_emulator::static_shared(&name##_key, sizeof(name##_shared_type), alignof(name##_shared_type)))
#define FB_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cuda_emulator::dynamic_shared())

namespace fuseblock {

// Whether the device that this is compiled for has clusters, mbarriers with transactions and bulk copies.
inline constexpr bool kHasClusters = true;

}  // namespace fuseblock

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernel_registry.h"

#define FB_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  (::fuseblock::registered<FB_UNWRAP kernel>(),                                             \
   FB_UNWRAP kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__))
#define FB_LAUNCH_PLACED(kernel, placement, grid, block, shared_bytes, stream, ...)                                   \
  (::fuseblock::registered<FB_UNWRAP kernel>(),                                                                       \
   ::fuseblock::launch_placed(FB_UNWRAP kernel, (placement), (grid), (block), (shared_bytes),                         \
                              static_cast<cudaStream_t>(stream), __VA_ARGS__))
#define FB_RESIDENT_BLOCKS(kernel, placement, block, shared_bytes) \
  ::fuseblock::resident_blocks(reinterpret_cast<const void*>(FB_UNWRAP kernel), (placement), (block), (shared_bytes))
#define FB_SHARED(type, name, dims) __shared__ type name dims
#define FB_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(128) unsigned char fb_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(fb_dynamic_shared)

namespace fuseblock {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasClusters = false;
#else
inline constexpr bool kHasClusters = true;
#endif

// What a launch needs beyond <<<>>>, in the form that the runtime takes it.
struct PlacedLaunch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};

  PlacedLaunch(const Placement& placement, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (placement.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {placement.cluster, 1, 1};
    }
    if (placement.cooperative) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    }
  }
  PlacedLaunch(const PlacedLaunch&) = delete;

  // Leave to use as much shared memory, and so large a cluster. Eight blocks are what every GPU with clusters has.
  // Where leave is needed, it is for all that the device has: another thread may launch the same kernel with another size.
  static cudaError_t prepare(const void* kernel, const Placement& placement, size_t shared_bytes) {
    cudaFuncAttributes has{};
    cudaError_t error = cudaFuncGetAttributes(&has, kernel);
    // Made of older PTX, a kernel knows nothing of its cluster: each block would take itself for the first.
    if (error == cudaSuccess && placement.cluster > 1 && has.ptxVersion < 90) error = cudaErrorInvalidDeviceFunction;
    if (error == cudaSuccess && shared_bytes > static_cast<size_t>(has.maxDynamicSharedSizeBytes)) {
      int device = 0, most = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - static_cast<int>(has.sharedSizeBytes));
    }
    if (error == cudaSuccess && placement.cluster > 8) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch_placed(void (*kernel)(Parameters...), const Placement& placement, dim3 grid, dim3 block,
                          size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = PlacedLaunch::prepare(function, placement, shared_bytes)) return error;
  const PlacedLaunch launch(placement, grid, block, shared_bytes, stream);
  // The runtime wants a pointer to a value of each parameter's exact type.
  return [&](Parameters... values) {
    void* pointers[] = {static_cast<void*>(&values)...};
    return cudaLaunchKernelExC(&launch.config, function, pointers);
  }(static_cast<Parameters>(arguments)...);
}

// On the current device. A MIG slice counts as the small GPU that it is.
inline Residency resident_blocks(const void* kernel, const Placement& placement, dim3 block, size_t shared_bytes) {
  int device = 0, clusters = 0, cooperative = 0, shared_limit = 0, multiprocessors = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const DeviceLimits limits{clusters != 0, cooperative != 0, static_cast<size_t>(shared_limit)};
  if (const char* why = refusal(limits, placement, shared_bytes)) return {0, why};
  if (PlacedLaunch::prepare(kernel, placement, shared_bytes) == cudaSuccess) {
    if (placement.cluster > 1) {
      const PlacedLaunch launch(placement, dim3(placement.cluster), block, shared_bytes, nullptr);
      if (cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) count = 0;
      count *= static_cast<int>(placement.cluster);
    } else {
      const int threads = static_cast<int>(block.x * block.y * block.z);
      const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes);
      count = error == cudaSuccess ? count * multiprocessors : 0;
    }
  }
  if (count == 0) cudaGetLastError();  // asked and answered: the next launch is not to be blamed for it
  return residency(count, placement);
}

}  // namespace fuseblock

#endif

#define FB_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  FB_LAUNCH_PLACED(kernel, (::fuseblock::Placement{1, true}), grid, block, shared_bytes, stream, __VA_ARGS__)

// FB_UNWRAP (a, b)  ->  a, b
#define FB_UNWRAP(...) __VA_ARGS__
