// What planning a run of the recurrence or of a whole layer needs: costs, scratch memory, packed sizes, shares of rows.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "lstm_recurrence.h"

namespace fuseblock::cpu {

// Costs in multiply-adds of one core. A unit's gates cost about as much as 100 of them.
constexpr int64_t kGateCost = 100;
constexpr int64_t kWorkPerThread = 1 << 20;   // below this, waking a thread costs more than it saves
constexpr int64_t kPackGrain = 1 << 15;       // elements
constexpr int64_t kMaxVecs = 4;               // vectors of outputs per flat block

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t compute_bytes(DType d) { return d == DType::f64 ? 8 : 4; }
inline int64_t storage_bytes(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<char, Free>;

inline Scratch allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, divide_up(bytes + 1, 64) * 64);
  if (!p) throw std::bad_alloc();
  return Scratch(static_cast<char*>(p));
}

// Bounds of `parts` ranges of rows with nearly equal numbers of active steps.
inline std::vector<int64_t> row_bounds(const Layout& l, int64_t parts) {
  std::vector<int64_t> bounds(parts + 1, l.B);
  bounds[0] = 0;
  if (!l.active) {
    for (int64_t i = 1; i < parts; ++i) bounds[i] = l.B * i / parts;
    return bounds;
  }
  int64_t total = 0, done = 0, part = 1;
  for (int64_t t = 0; t < l.T; ++t) total += l.active[t];
  for (int64_t k = 0, length = l.T; k < l.B && part < parts; ++k) {
    while (length > 0 && l.active[length - 1] <= k) --length;
    done += length;
    while (part < parts && done * parts >= total * part) bounds[part++] = k + 1;
  }
  return bounds;
}

inline PackedMatrix flat_matrix(int64_t outputs, int64_t K, int64_t output_stride, int64_t k_stride, int64_t lanes,
                                int64_t members) {
  const int64_t vectors = divide_up(outputs, lanes);
  int64_t blocks = divide_up(divide_up(vectors, kMaxVecs), members) * members;
  if (blocks > vectors) blocks = vectors;
  return {nullptr, nullptr, outputs, K, output_stride, k_stride, vectors, blocks, false};
}

inline int64_t packed_elements(const PackedMatrix& m, int64_t lanes) { return m.vectors * (m.gates ? 4 : 1) * m.K * lanes; }

}  // namespace fuseblock::cpu
