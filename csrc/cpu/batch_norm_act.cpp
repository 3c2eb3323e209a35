// Plans batch_norm_act: which thread does which slice of which channel, and what happens between sums and results.
//
// Rows: a thread takes whole channels and uses their elements again for the results, while they are in its cache. Few
// channels are cut into slices, channels-last tensors into ranges of rows, with all sums before all results.
#include "batch_norm_act.h"

#include <vector>

#include "kernel_table.h"
#include "plan.h"
#include "team.h"

namespace fuseblock::cpu {

extern const NormKernels norm_kernels_baseline;
#if defined(__x86_64__)
extern const NormKernels norm_kernels_avx2, norm_kernels_avx512;
#endif

namespace {

constexpr int64_t kGrain = 1 << 14;     // elements; below this, waking a thread costs more than it saves
constexpr int64_t kWidest = 1024;       // channels of a view

const NormKernels& norm_kernels() {
#if defined(__x86_64__)
  switch (kernel_table()->vector_bytes) {
    case 64: return norm_kernels_avx512;
    case 32: return norm_kernels_avx2;
  }
#endif
  return norm_kernels_baseline;
}

// Statistics of parts become those of the whole: Chan, Golub and LeVeque 1979.
struct Merged {
  double n = 0, mean = 0, squares = 0;
  void add(double count, double part_mean, double part_squares) {
    if (count == 0) return;
    const double delta = part_mean - mean, total = n + count;
    mean += delta * (count / total);
    squares += part_squares + delta * delta * (n * count / total);
    n = total;
  }
};

class Run {
 public:
  Run(const NormCall& call, NormSums what, int64_t sums, NormResult result, const NormChannel& channel,
      const Threads& threads)
      : kernels_(norm_kernels()), what_(what), result_(result), K_(sums), channel_(channel), threads_(threads) {
    static_cast<NormCall&>(view_) = call;
    const int64_t lanes = kernels_.vector_bytes / compute_bytes(call.dtype);
    view_.width = call.C;
    if (call.channels_last)
      while (view_.width % lanes && rows() % 2 == 0 && view_.width <= kWidest / 2) view_.width *= 2;
    view_.padded = divide_up(view_.width, lanes) * lanes;
    const int64_t bytes = kNormOperands * view_.padded * compute_bytes(call.dtype);
    operands_ = allocate(bytes);
    __builtin_memset(operands_.get(), 0, bytes);
    view_.operands = operands_.get();
  }

  void run() {
    if (view_.channels_last) return run_last();
    const int64_t C = view_.C, each = view_.N * view_.S, parts = slices_of_channel();
    const bool masked = view_.mask_result != nullptr;
    const int64_t grain = kGrain / (each / parts + 1) + 1;
    if (parts == 1) {
      in_parallel(C, grain, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          double sums[kMostNormSums] = {};
          const NormSlice slice{c, 0, each};
          if (what_ != NormSums::stats) set_operands(c, nullptr);
          if (what_ != NormSums::none) {
            kernels_.sum(view_, what_, slice, sums);
            set_operands(c, sums);
          }
          if (result_ != NormResult::none && !masked) kernels_.apply(view_, result_, slice);
        }
      });
    } else {
      const auto slice = [&](int64_t j) {
        return NormSlice{j / parts, each * (j % parts) / parts, each * (j % parts + 1) / parts};
      };
      if (what_ != NormSums::stats)
        for (int64_t c = 0; c < C; ++c) set_operands(c, nullptr);
      std::vector<double> sums(C * parts * kMostNormSums);
      if (what_ != NormSums::none)
        in_parallel(C * parts, grain, [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) kernels_.sum(view_, what_, slice(j), &sums[j * kMostNormSums]);
        });
      for (int64_t c = 0; c < C && what_ != NormSums::none; ++c) {
        double total[kMostNormSums] = {};
        Merged merged;
        for (int64_t j = c * parts; j < (c + 1) * parts; ++j) {
          const double* const own = &sums[j * kMostNormSums];
          merged.add((double)(slice(j).end - slice(j).begin), own[0], own[1]);
          for (int64_t k = 0; k < K_; ++k) total[k] += own[k];
        }
        if (what_ == NormSums::stats) total[0] = merged.mean, total[1] = merged.squares;
        set_operands(c, total);
      }
      if (result_ != NormResult::none && !masked)
        in_parallel(C * parts, grain, [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) kernels_.apply(view_, result_, slice(j));
        });
    }
    if (masked) apply_with_mask(view_.N * C, view_.S);
  }

 private:
  const NormKernels& kernels_;
  NormSums what_;
  NormResult result_;
  int64_t K_;
  const NormChannel& channel_;
  Threads threads_;
  NormView view_;
  Scratch operands_;

  int64_t rows() const { return view_.N * view_.C / view_.width; }

  template <class F>
  void in_parallel(int64_t n, int64_t grain, F&& f) {
    parallel_for(threads_, n, grain, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      f(begin, end);
    });
  }

  int64_t slices_of_channel() const {
    const int64_t each = view_.N * view_.S, useful = each / kGrain;
    if (view_.C >= 8 * threads_.count || view_.C % threads_.count == 0 || useful < 2) return 1;
    return useful < threads_.count ? useful : threads_.count;
  }

  void set_operands(int64_t c, const double* sums) {
    double values[kNormOperands] = {};
    channel_.operands(channel_.context, channel_.first + c, sums, values);
    for (int64_t column = c; column < view_.width; column += view_.C)
      for (int row = 0; row < kNormOperands; ++row) {
        if (view_.dtype == DType::f64) static_cast<double*>(view_.operands)[row * view_.padded + column] = values[row];
        else static_cast<float*>(view_.operands)[row * view_.padded + column] = (float)values[row];
      }
  }

  void run_last() {
    const int64_t M = rows(), grain = kGrain / view_.width + 1;
    const int64_t wanted = M / grain, parts = wanted < 1 ? 1 : wanted < threads_.count ? wanted : threads_.count;
    const int64_t distance = K_ * view_.padded;
    const Scratch memory = allocate(parts * distance * (int64_t)sizeof(double));
    double* const sums = reinterpret_cast<double*>(memory.get());
    if (what_ != NormSums::stats)
      for (int64_t c = 0; c < view_.C; ++c) set_operands(c, nullptr);
    if (what_ != NormSums::none)
      in_parallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          __builtin_memset(sums + j * distance, 0, distance * sizeof(double));
          kernels_.sum(view_, what_, {0, M * j / parts, M * (j + 1) / parts}, sums + j * distance);
        }
      });
    for (int64_t c = 0; c < view_.C && what_ != NormSums::none; ++c) {
      double total[kMostNormSums] = {};
      Merged merged;
      for (int64_t j = 0; j < parts; ++j)
        for (int64_t column = c; column < view_.width; column += view_.C) {
          const double* const own = sums + j * distance + column;
          if (what_ == NormSums::stats) merged.add((double)(M * (j + 1) / parts - M * j / parts), own[0], own[view_.padded]);
          else for (int64_t k = 0; k < K_; ++k) total[k] += own[k * view_.padded];
        }
      if (what_ == NormSums::stats) total[0] = merged.mean, total[1] = merged.squares;
      set_operands(c, total);
    }
    if (result_ == NormResult::none) return;
    if (view_.mask_result) return apply_with_mask(M, view_.width);
    in_parallel(M, grain, [&](int64_t begin, int64_t end) { kernels_.apply(view_, result_, {0, begin, end}); });
  }

  // Rows of memory in groups of 8, which begin and end with whole bytes of the mask.
  void apply_with_mask(int64_t count, int64_t length) {
    in_parallel(divide_up(count, 8), kGrain / (8 * length) + 1, [&](int64_t begin, int64_t end) {
      kernels_.apply_with_mask(view_, 8 * begin, 8 * end < count ? 8 * end : count);
    });
  }
};

// Sample n of a call, alone.
NormCall sample_of(NormCall call, int64_t n) {
  const int64_t offset = n * call.N * call.C * call.S * storage_bytes(call.dtype);
  for (const void** p : {&call.x, &call.dy, &call.v, &call.v_r, &call.residual})
    if (*p) *p = static_cast<const char*>(*p) + offset;
  for (void** p : {&call.result, &call.result2, &call.result3})
    if (*p) *p = static_cast<char*>(*p) + offset;
  call.samples = 1;
  return call;
}

}  // namespace

void batch_norm_act(const NormCall& call, NormSums what, int64_t sums, NormResult result, const NormChannel& channel,
                    const Threads& threads) {
  if (call.samples == 1) return Run(call, what, sums, result, channel, threads).run();
  const auto run = [&](int64_t n, const Threads& own) {
    const NormChannel of_sample{channel.operands, channel.context, channel.first + n * call.C};
    Run(sample_of(call, n), what, sums, result, of_sample, own).run();
  };
  // A thread takes whole samples, and finds their elements in its cache when it comes to the results. Few large samples,
  // which would leave threads idle, have all threads one after the other.
  const int64_t each = call.N * call.C * call.S;
  if (call.samples % threads.count != 0 && call.samples < 8 * threads.count && each >= 2 * kGrain) {
    for (int64_t n = 0; n < call.samples; ++n) run(n, threads);
    return;
  }
  const Threads alone{threads.parallel_for, 1};
  parallel_for(threads, call.samples, kGrain / (each + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) run(n, alone);
  });
}

NormAdjoints second_order_of_channel(const double* sums, double v_w, double v_b, double v_a, double w, double s,
                                     double count, bool smooth, bool training) {
  const double ws = w * s, t1 = sums[0], t2 = sums[1], s1 = sums[2], s2 = sums[3], gv = sums[4];
  const double *h = sums + 5, *hv = sums + 8, *hr = sums + 10;
  const double per_value = training ? 1 / count : 0;
  const double k1 = v_b - ws * t1 * per_value, k2 = v_w - ws * t2 * per_value;
  // a_z = h q with q = ws V + k1 + k2 xhat + v_r: its sums, alone and times xhat
  const double hq = ws * hv[0] + k1 * h[0] + k2 * h[1] + hr[0], hq_xhat = ws * hv[1] + k1 * h[1] + k2 * h[2] + hr[1];
  const double z = smooth ? hq : v_a * h[0], z_xhat = smooth ? hq_xhat : v_a * h[1];
  const double e = v_w * s1 + w * z - ws * per_value * (t1 * s2 + s1 * t2);
  const double e_xhat = v_w * s2 + w * z_xhat - 2 * ws * per_value * t2 * s2;
  const double gv_left = gv - (s1 * t1 + s2 * t2) * per_value;
  return {{ws, k1, k2, v_a, -s * ws * s2 * per_value, s * k2, ws, -s * e * per_value,
           -s * (e_xhat + s * w * gv_left) * per_value},
          s * gv_left + z_xhat, z, hq};
}

}  // namespace fuseblock::cpu
