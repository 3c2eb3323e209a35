// Launchers of cluster.cu.
#pragma once

// How blocks send each other their part of the state.
enum Transport : int { kBulk, kStoreAsync, kStoreAndArrive, kStoreAndBarrier };

enum ClusterMistake : int {
  kNoClusterMistake,
  kNoWait,
  kWrongParity,
  kSingleBuffer,
  kSingleStage,
  kNoArrive,
  kTooFewBytes,
  kTooManyBytes,
  kEarlyExit,
  kNoStart,
  kForeignMBarrier,
  kArriveTwice,
  kInitTwice,
  kNotInitialised,
  kOverwritten,
  kBeyond,
  kOddSize,
  kNoSuchBlock,
  kUnpaired,
  kNoInitFence,
  kNoProxyFence,
};

inline constexpr int kSlice = 8;  // elements of the state that a block owns

extern "C" {
// y (clusters, steps, cluster * kSlice): the state after each step. A mistake needs `transport` kBulk.
int launch_gather(float* y, int cluster, int clusters, int steps, int transport, int mistake, void* stream);
// y (blocks, 64) = x (64) + rank, read by the first block of each cluster for all, written back by bulk copies.
int launch_multicast(const float* x, float* y, int cluster, int blocks, bool wait, void* stream);
// Blocks that run at the same time; 0, with *refusal.
int resident_gather(int cluster, bool cooperative, int shared_bytes, const char** refusal);
}
