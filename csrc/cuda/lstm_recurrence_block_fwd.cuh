// The block tier's forward kernel. For a step-by-step account with a picture: docs/how-the-recurrence-works.md.
#pragma once

#include "cuda/lstm_recurrence_block.cuh"

namespace fuseblock::lstm_block {

// A tile (16 units by one step of columns k) of a gate's weights, as the left operand of mma has it.
template <class T, int kPasses, class Slice>
__device__ __forceinline__ WeightTile load_tile(const T* w_hh, const Slice& slice, int gate, int k, const Thread& me) {
  const auto w = slice.weights(w_hh, gate);
  WeightTile tile;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int column = k * kStep<T> + (me.word + n / 2 * 4) * kWord<T>;
    tile.part[n] = weight<T, kPasses>(w.template load<kWord<T>>(me.unit + n % 2, column));
  }
  return tile;
}

// The input's share of the gates in one step, on its way from global to shared memory: gx. For whole layers x comes instead,
// and gx is made of it (lstm_recurrence_block_layer.cuh).
template <class Op, class T, int H, int kTiles>
struct Arriving : GatePieces<T, H, kTiles> {
  template <class Slice>
  __device__ Arriving(const Op&, const Slice&, const Thread&) {}

  template <class Slice>
  static __device__ auto input(const Op& op, const Slice& slice) {
    return slice.sequence(static_cast<const T*>(op.gx.data), kGates, op.gx.step_stride, op.gx.row_stride);
  }
};

template <class T, int kPasses, int H, int kTiles, bool kAligned, class Op = LstmFwd>
__global__ void __launch_bounds__(2 * H, 1) lstm_block_fwd_kernel(const Op op) {
  constexpr int kRows = kTiles * kTileRows, kWidth = kVectorWidth<T>;
  constexpr int kChains = kPasses == 3 && H > 64 ? 2 : 1;  // long ones round more than float32 should
  using Hidden = SharedRows<T, kRows, H>;
  using Gates4 = SharedRows<T, kRows, kGates * H>;
  using Cells = SharedRows<float, kRows, H>;
  FB_SHARED(Hidden, h, [2]);  // of the step before and of this one, in turns
  FB_SHARED(Gates4, gates, ); // gx of this step; each thread puts its activated gates in the place of its own gx
  FB_SHARED(Cells, cells, );  // c on its way out
  static_assert(sizeof(h) + sizeof(gates) + sizeof(cells) + kWeightBytes<T, H> <= kMostSharedBytes<H>);

  const Thread me;
  const Slice<kAligned> slice(op.shape, blockIdx.y, static_cast<int64_t>(blockIdx.x) * kRows, kRows);
  auto input = Arriving<Op, T, H, kTiles>::input(op, slice);
  auto y = slice.sequence(static_cast<T*>(op.y), 1);
  auto saved_gates = slice.sequence(static_cast<T*>(op.gates), kGates);
  auto saved_c = slice.sequence(op.c, 1);
  const bool saves = op.gates != nullptr;

  // Before the first step: the weights, for good; h0, c0 and the first gx.
  FB_DYNAMIC_SHARED(char, room);
  Weights<T, H> weights;
  weights.load(room + threadIdx.x / 32 * weights.kBytes, Lane(), [&](int n) {
    return load_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, n % kGates, n / kGates, me);
  });

  UnitPieces<T, kTiles> h0;
  h0.load(slice.state(static_cast<const T*>(op.h0)), me);
  h0.put(h[0], me);
  Arriving<Op, T, H, kTiles> arriving(op, slice, me);
  arriving.load(input, me);
  arriving.put(gates, me);

  const auto c0 = slice.state(op.c0);
  Vec<float, 2> c[kTiles][2];
  int length[kTiles][2], piece_length[UnitPieces<T, kTiles>::kCount];  // of the cells; of the pieces of y
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    const int row = n / 2 * kTileRows + me.row + n % 2;
    c[n / 2][n % 2] = c0.template load<2>(row, me.unit);
    length[n / 2][n % 2] = slice.length(row, me.unit);
  }
  UnitPieces<T, kTiles>::each(me, [&](int n, int row, int) { piece_length[n] = slice.length(row); });
  __syncthreads();

  for (int step = 0; step < slice.steps; ++step) {
    const int t = slice.time(step);
    Hidden &h_before = h[step % 2], &h_now = h[(step + 1) % 2];
    // Asked for now, needed at the end of the step.
    if (step + 1 < slice.steps) {
      input.move(1);
      arriving.load(input, me);
    }

    // W h for all rows; the sums of a gate and a tile are one chain of mma, in three passes two or three.
    Sum<kPasses, kChains> sum[kGates][kTiles];
#pragma unroll
    for (int k = 0; k < H / kStep<T>; k += 2) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        RightOperand<T, kPasses> x[2];
        load_operands(x, h_before, tile, k * kStep<T>, me);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            multiply(sum[gate][tile], weights.get((k + n) * kGates + gate).part, x[n], n % kChains);
          }
        }
      }
    }

    // The thread's own cells: all four gates of each are in its registers.
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      const int tile = n / 2, r = n % 2, row = tile * kTileRows + me.row + r;
      const GateVecs<T, 2> from_input = own_gates<T, H>(gates, row, me.unit);
      GateVecs<T, 2> activated = zero_gates<T, 2>();
      Vec<T, 2> h_new = h_before.template at<2>(row, me.unit);
      if (t < length[tile][r]) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          if (!slice.has_unit(me.unit + u)) continue;
          const Gates<float> x = from_input[u];
          const int cell = 2 * u + r;
          const Gates<float> s = activate(Gates<float>{x.i + sum[0][tile][cell], x.f + sum[1][tile][cell],
                                                       x.g + sum[2][tile][cell], x.o + sum[3][tile][cell]});
          const float c_new = s.f * c[tile][r][u] + s.i * s.g;
          c[tile][r].set(u, c_new);
          h_new.set(u, s.o * tanh_(c_new));
          activated.set(u, s);
        }
      }
      h_now.template at<2>(row, me.unit) = h_new;
      if (saves) {
        put_own_gates<T, H>(gates, row, me.unit, activated);
        cells.template at<2>(row, me.unit) = c[tile][r];
      }
    }

    // What the lanes of a warp have put together leaves in pieces of 16 bytes.
    __syncwarp();
    UnitPieces<T, kTiles>::each(me, [&](int n, int row, int unit) {
      y.store(row, unit, t < piece_length[n] ? h_now.template at<kWidth>(row, unit) : zeros<T, kWidth>());
    });
    y.move(1);
    if (saves) {
      GatePieces<T, H, kTiles>::store(gates, saved_gates, me);
      UnitPieces<float, kTiles>::store(cells, saved_c, me);
      saved_gates.move(1);
      saved_c.move(1);
    }
    arriving.put(gates, me);  // where this very lane has just taken its pieces from
    // h_now is whole. The next step writes over h_before, which nobody reads any more.
    __syncthreads();
  }

  UnitPieces<T, kTiles>::store(h[slice.steps % 2], slice.state(static_cast<T*>(op.h_n)), me);
  const auto c_n = slice.state(op.c_n);
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    c_n.store(n / 2 * kTileRows + me.row + n % 2, me.unit, c[n / 2][n % 2]);
  }
}

template <class T, int kPasses>
cudaError_t run(const LstmFwd& op, void* stream) {
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % kVectorWidth<T> == 0 && is_aligned(op.gx, kVectorWidth<T>) &&
                       are_aligned({op.h0, op.c0, op.y, op.h_n, op.c_n, op.gates, op.c});
  return dispatch<T>(op.shape, op.w_hh, aligned, false, [&]<int H, int kTiles, bool kAligned>(dim3 grid) {
    return FB_LAUNCH_PLACED((lstm_block_fwd_kernel<T, kPasses, H, kTiles, kAligned>), Placement{}, grid, dim3(2 * H),
                            (kWeightBytes<T, H>), stream, op);
  });
}

}  // namespace fuseblock::lstm_block
