// The block tier's backward kernel: the picture of the forward pass with the weights transposed.
//
//   dh (of the step before) = W_hh^T dgates    a warp owns the same 16 units, now as rows of W_hh^T, and all 4 H columns
//
// dh and dc stay in registers. d(gates) of a step are in shared memory for the product, and are d(gx) as they leave.
#pragma once

#include "cuda/lstm_recurrence_block.cuh"

namespace fuseblock::lstm_block {

// A tile (16 units by one step of a gate's rows k) of the transposed weights, as the left operand of mma has it: a thread reads
// its two units of the rows that make two words, and puts together what belongs to the same unit.
template <class T, int kPasses, class Slice>
__device__ __forceinline__ WeightTile load_transposed_tile(const T* w_hh, const Slice& slice, int gate, int k, const Thread& me) {
  const auto w = slice.weights(w_hh, gate);
  WeightTile tile;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    Word<T> words[2];
#pragma unroll
    for (int m = 0; m < kWord<T>; ++m) {
      const Vec<T, 2> both = w.template load<2>(k * kStep<T> + (me.word + n * 4) * kWord<T> + m, me.unit);
      words[0].element[m] = both.element[0];
      words[1].element[m] = both.element[1];
    }
    tile.part[2 * n] = weight<T, kPasses>(words[0]);
    tile.part[2 * n + 1] = weight<T, kPasses>(words[1]);
  }
  return tile;
}

template <class T, int kPasses, int H, int kTiles, bool kAligned>
__global__ void __launch_bounds__(2 * H, 1) lstm_block_bwd_kernel(const LstmBwd op) {
  constexpr int kRows = kTiles * kTileRows;
  // Whether c is asked for a turn ahead; else the product, longer there, hides the wait.
  constexpr bool kEarly = H / kStep<T> <= 4;
  constexpr bool kExtras = kTiles == 1;  // d_gates and d_c may be there
  using Hidden = SharedRows<T, kRows, H>;
  using Gates4 = SharedRows<T, kRows, kGates * H>;
  FB_SHARED(Gates4, gates, [2]);  // of this step and of the next to be done; a thread puts dgates in the place of its own
  FB_SHARED(Hidden, dy_now, );
  static_assert(sizeof(gates) + sizeof(dy_now) + kWeightBytes<T, H> <= kMostSharedBytes<H>);

  const Thread me;
  const Slice<kAligned> slice(op.shape, blockIdx.y, static_cast<int64_t>(blockIdx.x) * kRows, kRows);
  const int last = slice.steps - 1;
  auto saved_gates = slice.sequence(static_cast<const T*>(op.gates), kGates);
  auto saved_c = slice.sequence(op.c, 1);
  auto dy = slice.sequence(static_cast<const T*>(op.dy.data), 1, op.dy.step_stride, op.dy.row_stride);
  auto d_gates = slice.sequence(static_cast<const T*>(op.d_gates), kGates);
  auto d_c = slice.sequence(op.d_c, 1);
  auto dgx = slice.sequence(static_cast<T*>(op.dgx), kGates);
  saved_gates.move(last);
  saved_c.move(last);
  dy.move(last);
  d_gates.move(last);
  d_c.move(last);
  dgx.move(last);
  const bool has_dy = op.dy.data != nullptr;

  FB_DYNAMIC_SHARED(char, room);
  Weights<T, H> weights;
  weights.load(room + threadIdx.x / 32 * weights.kBytes, Lane(), [&](int n) {
    return load_transposed_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, n % kGates, n / kGates, me);
  });

  const auto load_c = [&](Vec<float, 2>(&c)[kTiles][2], const auto& from) {
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      c[n / 2][n % 2] = from.template load<2>(n / 2 * kTileRows + me.row + n % 2, me.unit);
    }
  };
  // c as the step before `step` left it.
  const auto load_c_before = [&](Vec<float, 2>(&c)[kTiles][2], int step) {
    if (step == 0) return load_c(c, slice.state(op.c0));
    saved_c.move(-1);
    load_c(c, saved_c);
  };

  // Everything of the last step, and the gradients that come from after it.
  GatePieces<T, H, kTiles> arriving;
  UnitPieces<T, kTiles> arriving_dy;
  arriving.load(saved_gates, me);
  arriving.put(gates[last % 2], me);
  if (has_dy) {
    arriving_dy.load(dy, me);
    arriving_dy.put(dy_now, me);
  }
  Vec<float, 2> c_now[kTiles][2], c_before[kTiles][2], arriving_c[kTiles][2];
  load_c(c_now, saved_c);
  load_c_before(c_before, last);

  float dh[kTiles][2][2], dc[kTiles][2][2];  // [tile][row][unit]
  int length[kTiles][2];
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    const int tile = n / 2, r = n % 2, row = tile * kTileRows + me.row + r;
    length[tile][r] = slice.length(row, me.unit);
    Vec<T, 2> dh_n = zeros<T, 2>();
    Vec<float, 2> dc_n = zeros<float, 2>();
    if (op.dh_n != nullptr) dh_n = slice.state(static_cast<const T*>(op.dh_n)).template load<2>(row, me.unit);
    if (op.dc_n != nullptr) dc_n = slice.state(op.dc_n).template load<2>(row, me.unit);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      dh[tile][r][u] = dh_n[u];
      dc[tile][r][u] = dc_n[u];
    }
  }
  __syncwarp();

  for (int step = last; step >= 0; --step) {
    const int t = slice.time(step);
    Gates4& dgates = gates[step % 2];
    // Asked for now, needed in the next turn.
    if (step > 0) {
      saved_gates.move(-1);
      arriving.load(saved_gates, me);
      if (has_dy) {
        dy.move(-1);
        arriving_dy.load(dy, me);
      }
      if (kEarly) load_c_before(arriving_c, step - 1);
    }

    // The thread's own cells.
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      const int tile = n / 2, r = n % 2, row = tile * kTileRows + me.row + r;
      if (kExtras && op.d_c != nullptr) {
        const Vec<float, 2> extra = d_c.template load<2>(row, me.unit);
#pragma unroll
        for (int u = 0; u < 2; ++u) dc[tile][r][u] += extra[u];
      }
      GateVecs<T, 2> delta = zero_gates<T, 2>();
      if (t < length[tile][r]) {
        const GateVecs<T, 2> s = own_gates<T, H>(dgates, row, me.unit);
        GateVecs<T, 2> extra = zero_gates<T, 2>();
        if (kExtras && op.d_gates != nullptr) {
          extra = {d_gates.template load<2>(row, me.unit, 0), d_gates.template load<2>(row, me.unit, 1),
                   d_gates.template load<2>(row, me.unit, 2), d_gates.template load<2>(row, me.unit, 3)};
        }
        const Vec<T, 2> dy_own = has_dy ? dy_now.template at<2>(row, me.unit) : zeros<T, 2>();
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          if (!slice.has_unit(me.unit + u)) continue;
          const GatesBwd<float> d =
              lstm_step_bwd(s[u], c_before[tile][r][u], tanh_(c_now[tile][r][u]), dh[tile][r][u] + dy_own[u],
                            dc[tile][r][u], extra[u]);
          delta.set(u, d.delta);
          dc[tile][r][u] = d.dc_prev;
        }
      }
      put_own_gates<T, H>(dgates, row, me.unit, delta);
      c_now[tile][r] = c_before[tile][r];
    }
    d_gates.move(-1);
    d_c.move(-1);

    // d(gx) leaves in pieces of 16 bytes.
    __syncwarp();
    GatePieces<T, H, kTiles>::store(dgates, dgx, me);
    dgx.move(-1);
    // dgates are whole, and nobody reads the other buffer any more.
    __syncthreads();
    if (step > 0) {
      arriving.put(gates[(step + 1) % 2], me);
      if (has_dy) arriving_dy.put(dy_now, me);
      if (kEarly) {
#pragma unroll
        for (int n = 0; n < 2 * kTiles; ++n) c_before[n / 2][n % 2] = arriving_c[n / 2][n % 2];
      } else {
        load_c_before(c_before, step - 1);
      }
    }

    // W^T dgates for all rows, in a sum per gate: one chain of mma would be four times as long.
    Sum<kPasses> sum[kGates][kTiles];
#pragma unroll
    for (int k = 0; k < H / kStep<T>; k += 2) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          RightOperand<T, kPasses> x[2];
          load_operands(x, dgates, tile, gate * H + k * kStep<T>, me);
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply(sum[gate][tile], weights.get((k + n) * kGates + gate).part, x[n]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      const int tile = n / 2, r = n % 2;
      if (t < length[tile][r]) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int cell = 2 * u + r;
          dh[tile][r][u] = (sum[0][tile][cell] + sum[1][tile][cell]) + (sum[2][tile][cell] + sum[3][tile][cell]);
        }
      }
    }
    __syncwarp();  // what other lanes have put into gates and dy_now is read next
  }

  const auto dh0 = slice.state(static_cast<T*>(op.dh0));
  const auto dc0 = slice.state(op.dc0);
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    const int tile = n / 2, r = n % 2, row = tile * kTileRows + me.row + r;
    Vec<T, 2> dh_out;
    Vec<float, 2> dc_out;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      dh_out.set(u, dh[tile][r][u]);
      dc_out.set(u, dc[tile][r][u]);
    }
    dh0.store(row, me.unit, dh_out);
    dc0.store(row, me.unit, dc_out);
  }
}

template <class T, int kPasses>
cudaError_t run(const LstmBwd& op, void* stream) {
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % kVectorWidth<T> == 0 && is_aligned(op.dy, kVectorWidth<T>) &&
                       are_aligned({op.dh_n, op.dc_n, op.d_gates, op.d_c, op.gates, op.c, op.c0, op.dgx, op.dh0, op.dc0});
  // One tile leaves registers for gradients that only second derivatives bring, and for the weights of the largest class.
  constexpr int kLargestOfTwoTiles = 96;
  const bool one_tile = op.d_gates != nullptr || op.d_c != nullptr || op.shape.hidden > kLargestOfTwoTiles;
  return dispatch<T>(op.shape, op.w_hh, aligned, one_tile, [&]<int H, int kTiles, bool kAligned>(dim3 grid) {
    if constexpr (kTiles == 2 && H > kLargestOfTwoTiles) {
      return cudaErrorInvalidValue;
    } else {
      return FB_LAUNCH_PLACED((lstm_block_bwd_kernel<T, kPasses, H, kTiles, kAligned>), Placement{}, grid, dim3(2 * H),
                              (kWeightBytes<T, H>), stream, op);
    }
  });
}

}  // namespace fuseblock::lstm_block
