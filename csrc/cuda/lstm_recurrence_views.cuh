// Views of global memory for the recurrence's kernels with resident weights, whatever their tier.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda/lstm_recurrence.h"
#include "cuda/vector.h"

namespace fuseblock::lstm_recurrence {

inline constexpr int kTileRows = 8, kGates = 4;  // rows of the batch that a tensor core's instruction takes; i, f, g, o

// As a register of mma or ldmatrix.
template <class T, int N>
FB_HD uint32_t bits(const Vec<T, N>& x) {
  static_assert(sizeof(x) == 4);
  return *reinterpret_cast<const uint32_t*>(&x);
}

// A view of a slice's part of a tensor in global memory, one time step of it. Outside of the tensor, loads give zeros and
// stores do nothing. kAligned: H is a multiple of what 16 bytes hold, and rows start at such multiples, so that
// pieces of 16 bytes are in or out as a whole.
template <class T, bool kAligned>
struct Window {
  using Element = std::remove_const_t<T>;

  T* data;               // the slice's first row, the direction's first column
  int64_t step_stride;   // negative where time runs backwards
  uint32_t row_stride;   // offsets within a step fit into 32 bits, see `fits`: registers are what there is least of
  int rows, hidden;

  FB_HD void move(int64_t steps) { data += steps * step_stride; }

  template <int N>
  FB_HD Vec<Element, N> load(int row, int unit, int gate = 0) const {
    Vec<Element, N> x = zeros<Element, N>();
    const T* p = at(row, unit, gate);
    if constexpr (kAligned) {
      if (row < rows && unit < hidden) x = *reinterpret_cast<const Vec<Element, N>*>(p);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (row < rows && unit + n < hidden) x.element[n] = p[n];
      }
    }
    return x;
  }

  template <int N>
  FB_HD void store(int row, int unit, const Vec<T, N>& x, int gate = 0) const {
    T* p = at(row, unit, gate);
    if constexpr (kAligned) {
      if (row < rows && unit < hidden) *reinterpret_cast<Vec<T, N>*>(p) = x;
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (row < rows && unit + n < hidden) p[n] = x.element[n];
      }
    }
  }

 private:
  FB_HD T* at(int row, int unit, int gate) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    const uint32_t elements = row * row_stride + static_cast<uint32_t>(gate * hidden + unit);
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + elements * static_cast<uint32_t>(sizeof(T)));
  }
};

// Some rows of the batch and one direction, which a block (or several, each with units of its own) works on, and views of
// its part of tensors. Steps are counted in the order in which the forward pass takes them: those of the second direction
// from the end of time.
template <bool kAligned>
struct Slice {
  const LstmShape& shape;
  int direction, rows, steps, hidden;
  int64_t first_row;

  __device__ Slice(const LstmShape& shape, int direction, int64_t first_row, int most_rows)
      : shape(shape), direction(direction), first_row(first_row) {
    steps = static_cast<int>(shape.steps);
    hidden = static_cast<int>(shape.hidden);
    rows = static_cast<int>(shape.batch - first_row < most_rows ? shape.batch - first_row : most_rows);
  }

  __device__ int time(int step) const { return direction == 0 ? step : steps - 1 - step; }

  // Time steps in which a cell is active: t < length; those out of range count as the nearest in it. Beyond the batch and
  // beyond H, cells never are: so padded units stay zero where others are infinite, although 0 * infinity is NaN.
  __device__ int length(int row, int unit = 0) const {
    if (row >= rows || unit >= hidden) return 0;
    const int64_t given = shape.lengths == nullptr ? steps : shape.lengths[first_row + row];
    return given < 0 ? 0 : given < steps ? static_cast<int>(given) : steps;
  }
  // Whether the neighbour of an active cell in a pair of units is within H, too: always, but where H is odd.
  __device__ bool has_unit(int unit) const { return kAligned || unit < hidden; }

  // (time, batch, directions * gates * hidden), its first step to begin with. Of an absent tensor: not to be used.
  template <class T>
  __device__ Window<T, kAligned> sequence(T* data, int gates, int64_t step_stride, int64_t row_stride) const {
    data += first_row * row_stride + static_cast<int64_t>(direction) * gates * hidden + time(0) * step_stride;
    return {data, direction == 0 ? step_stride : -step_stride, static_cast<uint32_t>(row_stride), rows, hidden};
  }
  template <class T>
  __device__ Window<T, kAligned> sequence(T* data, int gates) const {
    const int64_t columns = shape.directions * gates * hidden;
    return sequence(data, gates, shape.batch * columns, columns);
  }

  // (directions, batch, hidden)
  template <class T>
  __device__ Window<T, kAligned> state(T* data) const {
    return {data + (direction * shape.batch + first_row) * hidden, 0, static_cast<uint32_t>(hidden), rows, hidden};
  }

  // w_hh of one gate: a row per unit. Padded by the caller, so always aligned.
  template <class T>
  __device__ Window<const T, true> weights(const T* data, int gate) const {
    const int columns = (hidden + 7) / 8 * 8;
    data += static_cast<int64_t>(direction * kGates + gate) * hidden * columns;
    return {data, 0, static_cast<uint32_t>(columns), hidden, columns};
  }
};

// Elements of T, float16, bfloat16 or float32, in a piece of 16 bytes.
inline int piece_of(int dtype) { return dtype == kFloat32 ? 4 : 8; }

// Whether 16-byte pieces of the tensors are aligned, where H allows it (H % piece == 0). Absent tensors do not object.
inline bool are_aligned(std::initializer_list<const void*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; });
}
inline bool is_aligned(const Sequence& x, int piece) {
  return are_aligned({x.data}) && (x.data == nullptr || (x.step_stride % piece == 0 && x.row_stride % piece == 0));
}

// Whether the rows of a slice, at most 64 of up to four bytes an element, lie within 32-bit offsets.
inline bool fits(const Sequence& x) { return x.row_stride >= 0 && x.row_stride < INT32_MAX / 256; }

}  // namespace fuseblock::lstm_recurrence
