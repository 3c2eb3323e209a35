// The block tier's forward kernel for whole layers: it makes gx = W_ih x + b itself, of a small x.
//
// Two more mma for each gate, over k = 32 columns of x. Which column is which k does not matter, as long as both operands
// agree. So a lane takes 8 neighbouring columns of a row as its four words of both right operands: x comes from global memory
// in pieces of 16 bytes, into the registers where mma wants it. Every warp has all of x, and needs no other for it.
#pragma once

#include "cuda/lstm_recurrence_block_fwd.cuh"

namespace fuseblock::lstm_block {

struct Layer : LstmLayerFwd {
  bool wide;  // x can be read in pieces of 16 bytes
};

template <class T, int H>
struct Arriving<Layer, T, H, 1> {
  static constexpr int kWidth = kVectorWidth<T>, kSteps = kLstmBlockInput / kStep<T>;
  static_assert(sizeof(T) == 2 && kLstmBlockInput == 4 * kWidth);  // four lanes share a row

  WeightTile w_ih[kSteps][kGates];
  Vec<float, 2> bias[kGates];  // of the thread's own units
  Vec<T, kWidth> x;
  bool wide;

  template <class Slice>
  __device__ Arriving(const Layer& op, const Slice& slice, const Thread& me) : wide(op.wide) {
    const int hidden = slice.hidden, columns = static_cast<int>(op.input);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      __syncwarp();  // a gate at a time, or addresses take the registers of weights
      const T* of_gate = static_cast<const T*>(op.w_ih[slice.direction]) + gate * hidden * columns;
      const Window<const T, false> w{of_gate, 0, static_cast<uint32_t>(columns), hidden, columns};
#pragma unroll
      for (int n = 0; n < 4 * kSteps; ++n) {
        const int column = me.word * kWidth + n / 2 * kWord<T>;
        w_ih[n / 4][gate].part[n % 4] = bits(w.template load<kWord<T>>(me.unit + n % 2, column));
      }
      bias[gate] = zeros<float, 2>();
      for (const void* of_all : {op.b_ih[slice.direction], op.b_hh[slice.direction]}) {
        if (of_all == nullptr) continue;
        const Window<const T, false> b{static_cast<const T*>(of_all), 0, 0, 1, hidden};
        const Vec<T, 2> own = b.template load<2>(0, me.unit, gate);
        for (int u = 0; u < 2; ++u) bias[gate].element[u] += own[u];
      }
    }
  }

  // x, for both directions the same columns.
  template <class Slice>
  static __device__ Window<const T, true> input(const Layer& op, const Slice& slice) {
    const auto [data, step_stride, row_stride] = op.x;
    const T* first = static_cast<const T*>(data) + slice.first_row * row_stride + slice.time(0) * step_stride;
    return {first, slice.direction == 0 ? step_stride : -step_stride, static_cast<uint32_t>(row_stride), slice.rows,
            static_cast<int>(op.input)};
  }

  __device__ void load(const Window<const T, true>& from, const Thread& me) {
    x = load_piece(from, wide, me.lane / 4, me.word * kWidth);
  }

  // Of the thread's own units, rounded to T as in memory.
  __device__ void put(typename GatePieces<T, H, 1>::Shared& gates, const Thread& me) const {
    Sums sum[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const auto [b0, b1] = bias[gate].element;
      sum[gate] = {b0, b0, b1, b1};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t(&words)[2] = reinterpret_cast<const uint32_t(&)[2]>(x.element[4 * step]);
        mma_m16n8k16<T>(sum[gate].element, w_ih[step][gate].part, words);
      }
    }
    __syncwarp();  // the gates that were there have left
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      GateVecs<T, 2> gx;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        gx.set(u, {sum[0][2 * u + r], sum[1][2 * u + r], sum[2][2 * u + r], sum[3][2 * u + r]});
      }
      put_own_gates<T, H>(gates, me.row + r, me.unit, gx);
    }
  }
};

template <class T>
cudaError_t run_layer(const LstmLayerFwd& op, void* stream) {
  if (!fits(op.x) || op.input < 1 || op.input > kLstmBlockInput) return cudaErrorInvalidValue;
  const Layer layer{op, op.input % kVectorWidth<T> == 0 && is_aligned(op.x, kVectorWidth<T>)};
  const bool aligned = op.shape.hidden % kVectorWidth<T> == 0 &&
                       are_aligned({op.h0, op.c0, op.y, op.h_n, op.c_n, op.gates, op.c});
  return dispatch<T>(op.shape, op.w_hh, aligned, true, [&]<int H, int kTiles, bool kAligned>(dim3 grid) {
    if constexpr (kTiles == 2) {
      return cudaErrorInvalidValue;
    } else {
      constexpr int kClass = kAligned ? H : 128;  // H that is no multiple of 8 is rare: one kernel is enough for it
      static_assert(H <= kClass);
      return FB_LAUNCH_PLACED((lstm_block_fwd_kernel<T, 1, kClass, 1, kAligned, Layer>), Placement{}, grid, dim3(2 * kClass),
                              0, stream, layer);
    }
  });
}

}  // namespace fuseblock::lstm_block
