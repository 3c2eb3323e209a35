// The grid tier's backward kernel. Weights are owned in two dimensions: block (i, j) of a team holds the gate rows of row
// group i (columns x G groups of units, all four gates) and the columns of column group j (128 units). It owns the cells of part j
// of row group i. Per step:
//
//   cells      dh = dy + sum over i of the partial sums;  dgates: to row group i, and out as d(gx)
//   product    128 columns x all dgates of row group i: partial sums of dh, to the owners of those units
//
// Each of these ends with an arrival. No block needs more than a part of dgates, or sums more than `rows` numbers, always in
// the same order.
#pragma once

#include "cuda/lstm_recurrence_grid.cuh"

namespace fuseblock::lstm_grid {

// In shared memory: weights beyond the registers; dgates of the row group; stages.
template <class T, int S>
struct BwdShared {
  static constexpr int kTileGateCores = 4 * S;  // core matrices of dgates, 8 rows
  unsigned char* weights;
  Core<T>* dgates;
  Stage<T>* stages;

  __device__ BwdShared(unsigned char* start, const Plan& plan) : weights(start) {
    dgates = reinterpret_cast<Core<T>*>(weights + kWarps * Weights<T, S>::kBytes);
    stages = reinterpret_cast<Stage<T>*>(dgates + plan.tiles * kTileGateCores);
  }
};

// Partial sums of dh of 8 units and 8 rows, as mma leaves them: two neighbouring units in two neighbouring rows.
struct PartialTile {
  Sums lane[16];

  __device__ const Vec<float, 2>* own(const Lane& me) const {
    return reinterpret_cast<const Vec<float, 2>*>(&lane[me.unit / 2 * 4 + me.row / 2]) + me.unit % 2;
  }
};

// A team's part of the workspace: counters of row groups (arrivals with dgates: `columns` a step) and of column groups (with
// partial sums: `rows` a step), dgates and partial sums of two steps.
//
// Two are enough. A block arrives with dgates of step n only after it has copied those of step n - 1, and a block that has
// seen all arrivals of its row group in step n may write those of step n + 1 over those of n - 1.
// Partial sums of step n are read before the reader arrives with dgates of step n + 1. A block (i, j) that comes to write those
// of step n + 2 has seen its row group arrive with dgates of n + 2. So had it collected partial sums of n + 1, from all
// (x, c) of some column group c, and each of these had seen its whole row group x arrive with dgates of n + 1: every block of
// the team has.
// Nothing makes blocks of a column group wait for each other, so one may arrive there with step n + 1 before another with
// step n: even and odd steps are counted apart. With n + 2 it does not: as above, every block is then behind its arrival of n.
struct BwdExchange {
  Counter *rows, *columns;
  Ring dgates, partials;

  __device__ BwdExchange(void* workspace, const Plan& plan, int64_t dgates_bytes) {
    rows = static_cast<Counter*>(workspace);
    columns = rows + plan.rows;
    dgates = {reinterpret_cast<unsigned char*>(columns + 2 * plan.columns), plan.rows * dgates_bytes};
    partials = {dgates.data + 2 * dgates.bytes,
                int64_t{plan.blocks} * plan.groups * plan.tiles * plan.rows * int64_t{sizeof(PartialTile)}};
  }
  __device__ GridBarrier* row(int group) const { return &rows[group].barrier; }
  __device__ GridBarrier* column(int group, unsigned n) const { return &columns[2 * group + n % 2].barrier; }
};

template <class T, int kPasses, int S>
__global__ void __launch_bounds__(kThreads, 1) lstm_grid_bwd_kernel(const LstmBwd op, const Plan plan, const bool aligned) {
  using Shared = BwdShared<T, S>;
  FB_DYNAMIC_SHARED(unsigned char, memory);
  const Shared shared(memory, plan);
  const Place me(plan);
  Stage<T>& stage = shared.stages[me.warp];
  const int row_group = me.member / plan.columns, column_group = me.member % plan.columns;
  const int row_units = plan.columns * plan.groups * kTileUnits;  // of a row group
  const int bytes = plan.tiles * Shared::kTileGateCores * static_cast<int>(sizeof(Core<T>));
  const BwdExchange exchange(static_cast<char*>(op.workspace) + me.team * plan.team_bytes, plan, bytes);
  // Own cells in the dgates of a row group and in the partial sums of a step.
  const int own_cores = me.tile * Shared::kTileGateCores + (column_group * plan.groups + me.group) * kGates * kTileCores<T>;
  const int own_partials = (me.first_unit / kTileUnits * plan.tiles + me.tile) * plan.rows;
  const bool has_dy = op.dy.data != nullptr;
  unsigned done = 0;  // steps of this team, over all its jobs

  for (int number = me.team; number < plan.jobs; number += plan.teams) {
    const Job job(number, op.shape, plan);
    const Slice<true> slice(op.shape, job.direction, job.first_row, job.most_rows);
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

    Weights<T, S> weights;
    weights.load(shared.weights + me.warp * weights.kBytes, me.lane, [&](int n) {
      // dgates lie in the order (group of units, gate, unit).
      constexpr int kGroupRows = kGates * kTileUnits;
      const int k = n * kStep<T>, first_unit = row_group * row_units + k / kGroupRows * kTileUnits;
      return backward_tile<T, kPasses>(static_cast<const T*>(op.w_hh), slice, column_group * kColumns + me.warp * 16, first_unit,
                                       kTileUnits, k % kGroupRows, me.lane);
    });

    Pieces<T, kGates> arriving;
    Pieces<T, 1> arriving_dy;
    Vec<float, 2> c_before = zeros<float, 2>(), c_now = c_before, dc = c_before, dh = c_before;
    int length[2] = {};
    // Asks for what the cells of `step` need, c as the step before left it; takes views one step back.
    const auto ask = [&](int step) {
      arriving.load(saved_gates, aligned, me.first_row, me.first_unit, me.lane);
      if (has_dy) arriving_dy.load(dy, aligned, me.first_row, me.first_unit, me.lane);
      saved_gates.move(-1);
      saved_c.move(-1);
      dy.move(-1);
      c_before = step > 0 ? load_cells<float>(saved_c, me.row, me.unit) : load_cells<float>(slice.state(op.c0), me.row, me.unit);
    };
    if (me.owns_cells) {
      c_now = load_cells<float>(saved_c, me.row, me.unit);
      ask(last);
      if (op.dc_n != nullptr) dc = load_cells<float>(slice.state(op.dc_n), me.row, me.unit);
      if (op.dh_n != nullptr) {
        const Vec<T, 2> dh_n = load_cells<T>(slice.state(static_cast<const T*>(op.dh_n)), me.row, me.unit);
        for (int r = 0; r < 2; ++r) dh.set(r, dh_n[r]);
      }
      for (int r = 0; r < 2; ++r) length[r] = slice.length(me.row + r, me.unit);
    }
    // dh of own cells as the step before `t` got it, from the partial sums of the step at t.
    const auto collect = [&](int t) {
      const GridBarrier* const arrived = exchange.column(me.first_unit / kColumns, done - 1);
      if (me.lane.index == 0) wait_for_count(&arrived->arrived, (done + 1) / 2 * plan.rows);
      __syncwarp();
      const PartialTile* const from = reinterpret_cast<const PartialTile*>(exchange.partials.step(done - 1)) + own_partials;
      constexpr int kAtOnce = 8;  // loads under way
      Vec<float, 2> sum = zeros<float, 2>();
#pragma unroll 1
      for (int first = 0; first < plan.rows; first += kAtOnce) {
        Vec<float, 2> part[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          part[n] = first + n < plan.rows ? load_l2(from[first + n].own(me.lane)) : zeros<float, 2>();
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          for (int r = 0; r < 2; ++r) sum.element[r] += part[n].element[r];
        }
      }
      for (int r = 0; r < 2; ++r) {
        if (t < length[r]) dh.element[r] = sum.element[r];
      }
    };

    for (int step = last; step >= 0; --step) {
      const int t = slice.time(step);
      if (me.owns_cells) {
        arriving.put(stage.gates, me.lane);
        if (has_dy) arriving_dy.put(stage.units, me.lane);
        if (step < last) collect(slice.time(step + 1));
        __syncwarp();
        const GateVecs<T, 2> s = get_gates(stage.gates, me.lane);
        Vec<T, 2> dy_own[1] = {zeros<T, 2>()};
        if (has_dy) get_cells<1>(dy_own, stage.units, me.lane);
        GateVecs<T, 2> delta = zero_gates<T, 2>();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (op.d_c != nullptr) dc.element[r] += d_c.template load<1>(me.row + r, me.unit)[0];
          if (t >= length[r]) continue;
          Gates<float> extra{};
          if (op.d_gates != nullptr) {
            const auto of = [&](int gate) { return d_gates.template load<1>(me.row + r, me.unit, gate)[0]; };
            extra = {of(0), of(1), of(2), of(3)};
          }
          const GatesBwd<float> d =
              lstm_step_bwd(s[r], c_before[r], tanh_(c_now[r]), dh[r] + dy_own[0][r], dc[r], extra);
          delta.set(r, d.delta);
          dc.set(r, d.dc_prev);
        }
        c_now = c_before;
        d_gates.move(-1);
        d_c.move(-1);
        __syncwarp();  // all have read
        put_gates(stage.gates, kTileCores<T>, delta, me.lane);
        __syncwarp();
        publish<kGates>(exchange.dgates.step(done) + row_group * bytes + own_cores * sizeof(Core<T>), stage.gates, me.lane);
      }
      grid_arrive(exchange.row(row_group));

      // While dgates are on their way to the others. The stage is put again only behind the next __syncthreads.
      if (me.owns_cells) {
        Pieces<T, kGates>::store(stage.gates, kTileCores<T>, dgx, aligned, me.first_row, me.first_unit, me.lane);
        dgx.move(-1);
        if (step > 0) ask(step - 1);
      }

      grid_wait(exchange.row(row_group), (done + 1) * plan.columns);
      gather(shared.dgates, exchange.dgates.step(done) + row_group * bytes, plan);

      // Partial sums of a tile of rows after the other: a lane has two neighbouring units of the warp's 16.
      const int group = column_group * (kColumns / kTileUnits) + me.warp * 2 + me.lane.unit / 4;
#pragma unroll 1
      for (int tile = 0; tile < plan.tiles; ++tile) {
        Sums sum[1];
        multiply_all<T, kPasses, 2 * S>(sum, weights, shared.dgates + tile * Shared::kTileGateCores, me.lane);
        PartialTile* const into = reinterpret_cast<PartialTile*>(exchange.partials.step(done)) +
                                  ((group * plan.tiles + tile) * plan.rows + row_group);
        if (group < plan.blocks * plan.groups) store_l2(&into->lane[me.lane.index % 16], sum[0]);
      }
      grid_arrive(exchange.column(column_group, done));
      ++done;
    }

    if (me.owns_cells) {
      collect(slice.time(0));
      Vec<T, 2> dh0;
      for (int r = 0; r < 2; ++r) dh0.set(r, dh[r]);
      store_cells(slice.state(static_cast<T*>(op.dh0)), me.row, me.unit, dh0);
      store_cells(slice.state(op.dc0), me.row, me.unit, dc);
    }
  }
}

template <class T, int kPasses>
cudaError_t run(const LstmBwd& op, void* stream) {
  constexpr int kWidth = kVectorWidth<T>;
  if (!fits(op.dy)) return cudaErrorInvalidValue;
  const bool aligned = op.shape.hidden % kWidth == 0 && is_aligned(op.dy, kWidth) && are_aligned({op.gates, op.dgx});
  return dispatch<T>(op, true, stream, [&]<int S>(const Plan& plan) {
    const dim3 grid(static_cast<unsigned>(plan.teams * plan.blocks));
    return FB_LAUNCH_COOPERATIVE((lstm_grid_bwd_kernel<T, kPasses, S>), grid, dim3(kThreads), plan.shared_bytes, stream, op,
                                 plan, aligned);
  });
}

}  // namespace fuseblock::lstm_grid
