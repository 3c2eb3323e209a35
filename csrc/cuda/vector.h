// Loads and stores of N consecutive elements of a row, in 16-byte pieces where N elements are that long.
#pragma once

#include "cuda/numeric.h"
#include "cuda/rows.h"

namespace fuseblock {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T element[N];

  FB_HD State<T> operator[](int n) const { return widen(element[n]); }
  FB_HD void set(int n, State<T> x) { element[n] = narrow<T>(x); }
};

// Elements that fill 16 bytes.
template <class T>
inline constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// Puts x at `to` in global memory. By PTX, as the compiler takes the copy of a Vec apart and does not always put it together.
template <class T, int N>
FB_HD void store_vector(T* to, const Vec<T, N>& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(x) % 16 == 0) {
    uint32_t words[sizeof(x) / 4];
    memcpy(words, &x, sizeof(x));
#pragma unroll
    for (size_t i = 0; i < sizeof(x) / 16; ++i) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to) + 16 * i), "r"(words[4 * i]),
                   "r"(words[4 * i + 1]), "r"(words[4 * i + 2]), "r"(words[4 * i + 3])
                   : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Vec<T, N>*>(to) = x;
}

// Only plain ld/st: outputs may be views of inputs, so the read-only cache must not be used.
template <class T, int N>
FB_HD Vec<T, N> load(const Rows& rows, int64_t row, int64_t column) {
  return *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(rows.data) + row * rows.stride + column);
}

template <class T, int N>
FB_HD void store(const Rows& rows, int64_t row, int64_t column, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(rows.data) + row * rows.stride + column) = x;
}

template <class T, int N>
FB_HD Vec<T, N> zeros() {
  Vec<T, N> x;
#pragma unroll
  for (int n = 0; n < N; ++n) x.set(n, State<T>(0));
  return x;
}

template <class T, int N>
FB_HD Vec<T, N> load_or_zeros(const Rows& rows, int64_t row, int64_t column) {
  return rows.data == nullptr ? zeros<T, N>() : load<T, N>(rows, row, column);
}

template <class T, int N>
FB_HD void store_if_given(const Rows& rows, int64_t row, int64_t column, const Vec<T, N>& x) {
  if (rows.data != nullptr) store(rows, row, column, x);
}

// Whether every row of a view of elements of `size` bytes starts at a multiple of 16 bytes. Absent views do not object.
inline bool is_aligned(const Rows& rows, int size) {
  return rows.data == nullptr || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * size % 16 == 0);
}

}  // namespace fuseblock
