// The grid tier's forward kernel. A block owns 8 G units, all four gates of them: 32 G rows of W_hh. Its warps share the columns:
// a warp multiplies one group of 8 units by its part of h, and the parts are added in a fixed order.
#pragma once

#include "cuda/lstm_recurrence_grid.cuh"

namespace fuseblock::lstm_grid {

// In shared memory: weights beyond the registers; h; sums of the warps; stages.
template <class T, int S>
struct FwdShared {
  unsigned char* weights;
  int tile_cores;  // core matrices of h, 8 rows
  Core<T>* h;
  Sums (*sums)[kWarps][2][32];  // [tile][warp][gates i and f, gates g and o][lane]
  Stage<T>* stages;

  __device__ FwdShared(unsigned char* start, const Plan& plan) : weights(start) {
    tile_cores = 16 * S / plan.groups;
    h = reinterpret_cast<Core<T>*>(weights + kWarps * Weights<T, S>::kBytes);
    sums = reinterpret_cast<Sums(*)[kWarps][2][32]>(h + plan.tiles * tile_cores);
    stages = reinterpret_cast<Stage<T>*>(sums + plan.tiles);
  }
};

// A team's part of the workspace: a counter of its blocks, h of two steps. Beyond the units that blocks own, padded h is neither
// written nor copied: in shared memory it stays as h0 has it, zero.
//
// Two are enough. A block writes h of step n + 2 over that of step n only after it has seen all arrivals of step n + 1, and
// every block arrives there after it has copied h of step n.
struct FwdExchange {
  GridBarrier* arrived;
  Ring h;

  __device__ FwdExchange(void* workspace, const Plan& plan) {
    unsigned char* const start = static_cast<unsigned char*>(workspace);
    arrived = &reinterpret_cast<Counter*>(start)->barrier;
    h = {start + sizeof(Counter), int64_t{plan.tiles} * plan.operand_bytes};
  }
};

template <class T, int kPasses, int S>
__global__ void __launch_bounds__(kThreads, 1) lstm_grid_fwd_kernel(const LstmFwd op, const Plan plan, const bool aligned) {
  FB_DYNAMIC_SHARED(unsigned char, memory);
  const FwdShared<T, S> shared(memory, plan);
  const Place me(plan);
  Stage<T>& stage = shared.stages[me.warp];
  const FwdExchange exchange(static_cast<char*>(op.workspace) + me.team * plan.team_bytes, plan);
  const int own_core = me.tile * shared.tile_cores + me.first_unit / kVectorWidth<T>;
  const int parts = kWarps / plan.groups, part = me.warp / plan.groups;  // of h, one for each warp of a group
  const bool saves = op.gates != nullptr;
  unsigned done = 0;  // steps of this team, over all its jobs

  for (int number = me.team; number < plan.jobs; number += plan.teams) {
    const Job job(number, op.shape, plan);
    const Slice<true> slice(op.shape, job.direction, job.first_row, job.most_rows);
    auto gx = slice.sequence(static_cast<const T*>(op.gx.data), kGates, op.gx.step_stride, op.gx.row_stride);
    auto y = slice.sequence(static_cast<T*>(op.y), 1);
    auto saved_gates = slice.sequence(static_cast<T*>(op.gates), kGates);
    auto saved_c = slice.sequence(op.c, 1);
    const auto h0 = slice.state(static_cast<const T*>(op.h0));

    Weights<T, S> weights;  // tile 2 s + half: step s of the warp's part of k
    weights.load(shared.weights + me.warp * weights.kBytes, me.lane, [&](int n) {
      const int k = (part * S + n / 2) * kStep<T>;
      return forward_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, n % 2, me.first_unit, k, me.lane);
    });

    Vec<float, 2> c = zeros<float, 2>();
    Vec<T, 2> h = zeros<T, 2>();
    int length[2] = {};
    if (me.owns_cells) {
      c = load_cells<float>(slice.state(op.c0), me.row, me.unit);
      h = load_cells<T>(h0, me.row, me.unit);
      for (int r = 0; r < 2; ++r) length[r] = slice.length(me.row + r, me.unit);
    }

    for (int step = 0; step < slice.steps; ++step) {
      const int t = slice.time(step);
      // Asked for now, needed after the product.
      Pieces<T, kGates> arriving;
      if (me.owns_cells) {
        arriving.load(gx, aligned, me.first_row, me.first_unit, me.lane);
        gx.move(1);
      }

      // All of h. The first step of a job waits, too: it is going to write where others may still read.
      if (done > 0) grid_wait(exchange.arrived, done * plan.blocks);
      if (step > 0) {
        gather(shared.h, exchange.h.step(done - 1), plan);
      } else {
        for (int n = threadIdx.x; n < plan.tiles * shared.tile_cores * kTileRows; n += kThreads) {
          const int core = n / kTileRows, row = core / shared.tile_cores * kTileRows + n % kTileRows;
          shared.h[core].row[n % kTileRows] = load_piece(h0, aligned, row, core % shared.tile_cores * kVectorWidth<T>);
        }
        __syncthreads();
      }

      // W h, a tile of rows after the other.
#pragma unroll 1
      for (int tile = 0; tile < plan.tiles; ++tile) {
        Sums sum[2];
        multiply_all<T, kPasses, S>(sum, weights, shared.h + tile * shared.tile_cores + part * 2 * S, me.lane);
        for (int half = 0; half < 2; ++half) shared.sums[tile][me.warp][half][me.lane.index] = sum[half];
      }
      __syncthreads();

      if (me.owns_cells) {
        arriving.put(stage.gates, me.lane);
        Sums sum[2] = {};
        for (int n = 0; n < parts; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Sums& theirs = shared.sums[me.tile][n * plan.groups + me.group][half][me.lane.index];
#pragma unroll
            for (int m = 0; m < 4; ++m) sum[half].element[m] += theirs.element[m];
          }
        }
        __syncwarp();
        const GateVecs<T, 2> from_input = get_gates(stage.gates, me.lane);
        GateVecs<T, 2> activated = zero_gates<T, 2>();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (t >= length[r]) continue;
          const Gates<float> x = from_input[r], a = gates_of(sum, r);
          const Gates<float> s = activate(Gates<float>{x.i + a.i, x.f + a.f, x.g + a.g, x.o + a.o});
          c.set(r, s.f * c[r] + s.i * s.g);
          h.set(r, s.o * tanh_(c[r]));
          activated.set(r, s);
        }
        __syncwarp();  // all have read
        put_cells(stage.units, h, me.lane);
        if (saves) put_gates(stage.gates, kTileCores<T>, activated, me.lane);
        __syncwarp();
        publish<1>(exchange.h.step(done) + own_core * sizeof(Core<T>), stage.units, me.lane);
      }
      grid_arrive(exchange.arrived);
      ++done;

      // While h is on its way to the others. The stage is put again only behind the next __syncthreads.
      if (me.owns_cells) {
        Pieces<T, 1>::each(me.lane, [&](int, int core, int row, int unit, int) {
          const auto piece = t < slice.length(me.first_row + row) ? stage.units[core].row[row] : zeros<T, kVectorWidth<T>>();
          store_piece(y, aligned, me.first_row + row, me.first_unit + unit, piece);
        });
        y.move(1);
        if (saves) {
          Pieces<T, kGates>::store(stage.gates, kTileCores<T>, saved_gates, aligned, me.first_row, me.first_unit, me.lane);
          store_cells(saved_c, me.row, me.unit, c);
          saved_gates.move(1);
          saved_c.move(1);
        }
      }
    }

    if (me.owns_cells) {
      store_cells(slice.state(static_cast<T*>(op.h_n)), me.row, me.unit, h);
      store_cells(slice.state(op.c_n), me.row, me.unit, c);
    }
  }
}

template <class T, int kPasses>
cudaError_t run(const LstmFwd& op, void* stream) {
  constexpr int kWidth = kVectorWidth<T>;
  if (!fits(op.gx)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.gx, kWidth) && are_aligned({op.h0, op.y, op.gates});
  return dispatch<T>(op, false, stream, [&]<int S>(const Plan& plan) {
    const dim3 grid(static_cast<unsigned>(plan.teams * plan.blocks));
    return FB_LAUNCH_COOPERATIVE((lstm_grid_fwd_kernel<T, kPasses, S>), grid, dim3(kThreads), plan.shared_bytes, stream, op,
                                 plan, aligned);
  });
}

}  // namespace fuseblock::lstm_grid
