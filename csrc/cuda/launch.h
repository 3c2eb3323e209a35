// How kernels are launched and how they name shared memory, so that one source serves nvcc and the CPU emulator.
//
//   FB_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...)   the parentheses protect the commas
//   FB_LAUNCH_COOPERATIVE(...)                       the same for kernels that call cooperative_groups' grid.sync()
//   FB_SHARED(float, tile, [4][32]);                 a static shared array
//   FB_DYNAMIC_SHARED(float, buffer);                float* buffer: the dynamic shared memory, aligned to 128 bytes
//
// Kernels and launchers use nothing else of CUDA's syntax extensions beyond the ordinary function qualifiers. PTX stands
// in small device functions of ptx.h, one instruction each, whose emulated twin is in the emulator; so no kernel has
// `asm` or an `#ifdef` of its own. With FUSEBLOCK_EMULATE_CUDA the emulator's header is found on the include path.
#pragma once

#if defined(FUSEBLOCK_EMULATE_CUDA)

#include "cuda_emulator.h"

#define FB_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch((grid), (block), (shared_bytes), false, [=] { FB_UNWRAP kernel(__VA_ARGS__); })
#define FB_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulator::launch((grid), (block), (shared_bytes), true, [=] { FB_UNWRAP kernel(__VA_ARGS__); })
#define FB_SHARED(type, name, dims)                                                     \
  using name##_shared_type = type dims;                                                 \
  static const char name##_key = 0;                                                     \
  auto& name = *static_cast<name##_shared_type*>(                                       \
      ::cuda_emulator::static_shared(&name##_key, sizeof(name##_shared_type), alignof(name##_shared_type)))
#define FB_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cuda_emulator::dynamic_shared())

#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernel_registry.h"

#define FB_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  (::fuseblock::registered<FB_UNWRAP kernel>(),                                             \
   FB_UNWRAP kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__))
#define FB_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)                                       \
  (::fuseblock::registered<FB_UNWRAP kernel>(),                                                                     \
   ::fuseblock::launch_cooperative(FB_UNWRAP kernel, (grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream), \
                                   __VA_ARGS__))
#define FB_SHARED(type, name, dims) __shared__ type name dims
#define FB_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(128) unsigned char fb_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(fb_dynamic_shared)

namespace fuseblock {

template <class... Parameters, class... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        Arguments... arguments) {
  // The runtime wants a pointer to a value of each parameter's exact type.
  [&](Parameters... values) {
    void* pointers[] = {static_cast<void*>(&values)...};
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream);
  }(static_cast<Parameters>(arguments)...);
}

}  // namespace fuseblock

#endif

// FB_UNWRAP (a, b)  ->  a, b
#define FB_UNWRAP(...) __VA_ARGS__
