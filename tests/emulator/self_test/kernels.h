// Launchers of the self-test kernels.
#pragma once

inline constexpr int kBlock = 64;

enum Mistake : int {
  kNone,
  kMissingBarrier,
  kOutOfBounds,
  kMissingGridBarrier,
  kOrdinaryLaunch,
  kDivergentBarrier,
  kDivergentCollectives,
  kForeignMask,
  kSourceOutside,
};

extern "C" {
int launch_block_sum(const float* x, float* y, int count, int mistake, void* stream);
// x: (steps + 1, blocks * threads)
int launch_ring(float* x, int blocks, int threads, int steps, int mistake, void* stream);
int launch_mma(const void* a, const void* b, float* c, bool is_bfloat16, void* stream);
int launch_half_warps(int* x, unsigned* votes, int threads, void* stream);
int launch_mistake(int* x, int mistake, void* stream);
int launch_order(int* y, int* counter, int threads, void* stream);
}
