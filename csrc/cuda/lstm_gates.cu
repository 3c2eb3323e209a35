// Launchers of the LSTM step kernels: choice of dtype, vector width and grid.
#include "cuda/lstm_gates.cuh"

namespace fuseblock {
namespace {

struct Grid {
  dim3 blocks, threads;
};

// Threads cover whole rows where these are short, so that neighbouring threads touch neighbouring addresses and few idle.
bool make_grid(const LstmStepShape& shape, int width, Grid& grid) {
  const int64_t per_row = shape.hidden / width;
  const int64_t chunks = (per_row + kLstmStepThreads - 1) / kLstmStepThreads;
  const int64_t x = (per_row + chunks - 1) / chunks;
  const int64_t y = kLstmStepThreads / x;
  const int64_t row_blocks = (shape.rows + y - 1) / y;
  if (chunks > 65535 || row_blocks > INT32_MAX) return false;
  grid.blocks = dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(chunks));
  grid.threads = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
  return true;
}

// Absent views do not constrain the width. `narrow` views hold T, `wide` ones C, which is never narrower.
template <class T, class C, size_t A, size_t B>
bool can_vectorise(int64_t hidden, const Rows (&narrow)[A], const Rows (&wide)[B]) {
  bool aligned = hidden % kVectorWidth<T> == 0;
  for (const Rows& rows : narrow) aligned = aligned && is_aligned(rows, sizeof(T));
  for (const Rows& rows : wide) aligned = aligned && is_aligned(rows, sizeof(C));
  return aligned;
}

// The vectorised kernel where it may run, else the scalar one.
#define FB_LAUNCH_STEP(kernel, vectorise, ...)                                                        \
  do {                                                                                                \
    Grid grid;                                                                                        \
    constexpr int width = kVectorWidth<T>;                                                            \
    const bool wide = (vectorise);                                                                    \
    if (!make_grid(step.shape, wide ? width : 1, grid)) return cudaErrorInvalidValue;                 \
    if (wide) {                                                                                       \
      FB_LAUNCH((kernel<T, C, width __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, step); \
    } else {                                                                                          \
      FB_LAUNCH((kernel<T, C, 1 __VA_OPT__(, ) __VA_ARGS__>), grid.blocks, grid.threads, 0, stream, step);     \
    }                                                                                                 \
    return cudaGetLastError();                                                                        \
  } while (false)

template <class T, class C>
cudaError_t run(const LstmStepFwd& step, void* stream) {
  FB_LAUNCH_STEP(lstm_step_fwd_kernel, (can_vectorise<T, C>(step.shape.hidden, {step.pre, step.h, step.acts, step.h_state},
                                                            {step.c_prev, step.c})));
}

template <class T, class C, bool kSaved>
cudaError_t run(const LstmStepBwd& step, void* stream) {
  FB_LAUNCH_STEP(lstm_step_bwd_kernel,
                 (can_vectorise<T, C>(step.shape.hidden,
                                      {step.gates, step.dm, step.dy, step.ext, step.delta, step.dm_keep},
                                      {step.c_prev, step.c, step.dc, step.d_c, step.dc_prev, step.dc_total})),
                 kSaved);
}

template <class T, class C, bool kSaved>
cudaError_t run(const LstmStepBwdBwd& step, void* stream) {
  FB_LAUNCH_STEP(lstm_step_bwd_bwd_kernel,
                 (can_vectorise<T, C>(step.shape.hidden,
                                      {step.gates, step.dm, step.ext, step.v, step.a_dm, step.a_ext, step.a_gates,
                                       step.a_dm_state},
                                      {step.c_prev, step.c, step.dc, step.v_dc_prev, step.a_dc, step.a_c_prev, step.a_c})),
                 kSaved);
}

// Calls launch.operator()<T, C>() for the types that the numbers name; C = T in 16 bit only with kNarrowState.
template <bool kNarrowState, class Launch>
cudaError_t dispatch(const LstmStepShape& shape, int dtype, int c_dtype, Launch launch) {
  if (shape.rows < 0 || shape.hidden < 0) return cudaErrorInvalidValue;
  if (shape.rows == 0 || shape.hidden == 0) return cudaSuccess;
  if (dtype == kFloat64 && c_dtype == kFloat64) return launch.template operator()<double, double>();
  if (dtype == kFloat32 && c_dtype == kFloat32) return launch.template operator()<float, float>();
  if (dtype == kFloat16 && c_dtype == kFloat32) return launch.template operator()<__half, float>();
  if (dtype == kBFloat16 && c_dtype == kFloat32) return launch.template operator()<__nv_bfloat16, float>();
  if constexpr (kNarrowState) {
    if (dtype == kFloat16 && c_dtype == kFloat16) return launch.template operator()<__half, __half>();
    if (dtype == kBFloat16 && c_dtype == kBFloat16) return launch.template operator()<__nv_bfloat16, __nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fuseblock

using namespace fuseblock;

int launch_lstm_step_fwd(const LstmStepFwd* step, int dtype, int c_dtype, void* stream) {
  return dispatch<true>(step->shape, dtype, c_dtype, [&]<class T, class C>() { return run<T, C>(*step, stream); });
}

int launch_lstm_step_bwd(const LstmStepBwd* step, int dtype, int c_dtype, void* stream) {
  return dispatch<false>(step->shape, dtype, c_dtype, [&]<class T, class C>() { return run<T, C, true>(*step, stream); });
}

int launch_lstm_step_bwd_bwd(const LstmStepBwdBwd* step, int dtype, int c_dtype, void* stream) {
  return dispatch<false>(step->shape, dtype, c_dtype, [&]<class T, class C>() { return run<T, C, true>(*step, stream); });
}

int launch_lstm_gates_bwd(const LstmStepBwd* step, int dtype, int c_dtype, void* stream) {
  return dispatch<true>(step->shape, dtype, c_dtype, [&]<class T, class C>() { return run<T, C, false>(*step, stream); });
}

int launch_lstm_gates_bwd_bwd(const LstmStepBwdBwd* step, int dtype, int c_dtype, void* stream) {
  return dispatch<true>(step->shape, dtype, c_dtype, [&]<class T, class C>() { return run<T, C, false>(*step, stream); });
}
