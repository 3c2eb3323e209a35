// Bytes that kernels load from and store to watched memory, counted by launch. Only the variant "counted" counts: its kernels
// are compiled with -fsanitize=thread, and the calls that the compiler puts before every access end in counting.cpp.
#pragma once

#include <cstddef>

namespace cuda_emulator {

#if defined(CUDA_EMULATOR_COUNTED)
// `launcher`: a mangled type that names the function which launches.
void count_launch(const char* launcher);
void count_load(const void* p, size_t bytes);
void count_store(const void* p, size_t bytes);
#else
inline void count_launch(const char*) {}
inline void count_load(const void*, size_t) {}
inline void count_store(const void*, size_t) {}
#endif

}  // namespace cuda_emulator
