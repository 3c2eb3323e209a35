// Launchers of grid.cu.
#pragma once

struct GridBarrierState {
  unsigned arrived, left;
};

enum GridMistake : int {
  kNoGridMistake,
  kGridNoWait,
  kGridWaitsForTooFew,
  kGridNoArrive,
  kGridArriveWithoutBarrier,
  kGridNoLeave,
  kGridLeavesEarly,
  kGridOrdinaryLaunch,
  kGridSleepsForever,
};

extern "C" {
// y (steps, blocks * threads): the state after each step; y is where blocks exchange it too.
int launch_spread(float* y, GridBarrierState* barrier, int blocks, int threads, int steps, int cluster, int mistake,
                  void* stream);
}
