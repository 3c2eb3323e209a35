// Launchers of warp.cu.
#pragma once

enum WarpMistake : int {
  kNoWarpMistake,
  kCopyWithoutWait,
  kCopyWaitsForTooFew,
  kCopyWithoutBarrier,
  kCopyMisaligned,
  kCopyOutside,
  kCopyLeft,
};

enum BarrierMistake : int { kNoBarrierMistake, kMissingArrival, kUnequalCounts, kBarrierMissing };


extern "C" {
// c (16, 8) = a (16, 16) b; b (16, 8) row major, or with `transposed` its transpose (8, 16). 16-bit a and b.
int launch_product(const void* a, const void* b, float* c, bool is_bfloat16, bool transposed, void* stream);
// c (16, 8) = a (16, 8) b^T, b (8, 8), rounded to TF32 or not.
int launch_product_tf32(const float* a, const float* b, float* c, bool round, void* stream);
// y (8, 8) = transpose of x, 16-bit.
int launch_transpose(const unsigned short* x, unsigned short* y, void* stream);
// Warp 0 makes `rounds` values for the warps 1 and 2, who add them up: y (64), every one of them 0 + ... + rounds - 1.
int launch_producer(int* y, int rounds, int mistake, void* stream);
// y = sum of the tiles of x (tiles, 128), element by element; what x lacks at its end counts as zero.
int launch_stream(const float* x, float* y, int count, int tiles, int mistake, void* stream);
}
