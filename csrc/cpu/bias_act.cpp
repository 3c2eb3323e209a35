#include "bias_act.h"

#include <algorithm>
#include <vector>

#include "kernel_table.h"
#include "team.h"

namespace fuseblock::cpu {

namespace {

// Waking the pool costs several microseconds, in which one thread does about this many elements.
constexpr int64_t kElementsPerThread = 16384;
// Runs of one channel shorter than this are handled a period at a time, in vectors that cross channels. Sums are then taken
// for every place of the period, so that only the shortest runs gain by it.
constexpr int64_t kShortRun = 64, kShortRunOfSums = 16;
// Of images; the parameters of a period should stay in the first cache.
constexpr int64_t kLongestPeriod = 16384;
// Each part of a sum is taken in order by one thread; the parts depend on the sizes alone, and so does the result.
constexpr int64_t kParts = 64;

int64_t state_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The site as the kernels want it, with the parameters of a channel repeated over a period where runs are short.
class Prepared {
 public:
  Prepared(BiasActSite& site, bool summed) : site_(site) {
    if (site.channels == 1) site.inner = std::max<int64_t>(site.count, 1);
    site.period = 0;
    const int64_t once = site.channels * site.inner;
    const bool is_short = site.inner == 1 || (site.inner < (summed ? kShortRunOfSums : kShortRun) && once <= kLongestPeriod);
    if (site.count > 0 && is_short) {
      site.period = once * ((kShortRun + once - 1) / once);
    }
    site.bias = parameter(site.bias);
    site.slope = parameter(site.slope);
  }

  const void* parameter(const void* p) {
    if (!p || !site_.period || site_.period == site_.channels) return p;
    repeated_.emplace_back(site_.period * state_size(site_.dtype));
    void* to = repeated_.back().data();
    if (site_.dtype == DType::f64) repeat<double>(p, to);
    else repeat<float>(p, to);
    return to;
  }

 private:
  template <class C>
  void repeat(const void* from, void* to) const {
    C* place = static_cast<C*>(to);
    const C* const end = place + site_.period;
    for (int64_t channel = 0; place != end; channel = channel + 1 < site_.channels ? channel + 1 : 0) {
      for (int64_t n = 0; n < site_.inner; ++n) *place++ = static_cast<const C*>(from)[channel];
    }
  }

  BiasActSite& site_;
  std::vector<std::vector<char>> repeated_;
};

// The mathematics of the smooth activations reaches its limits where subnormal numbers are flushed to 0.
template <class F>
void flushed_if_smooth(Activation a, F&& f) {
  if (is_smooth(a)) {
    const FlushSubnormals flush;
    f();
  } else {
    f();
  }
}

// Calls kernel(begin, end) on ranges that begin at whole bytes of the mask.
template <class Kernel>
void without_sums(const BiasActSite& s, const Threads& threads, Kernel&& kernel) {
  constexpr int64_t unit = 64;
  parallel_for(threads, (s.count + unit - 1) / unit, kElementsPerThread / unit, [&](int64_t begin, int64_t end) {
    flushed_if_smooth(s.activation, [&] { kernel(begin * unit, std::min(end * unit, s.count)); });
  });
}

template <class C>
void finish(const double* parts, int64_t count, int64_t distance, int64_t channels, void* to) {
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t p = 0; p < count; ++p) total += parts[p * distance + c];
    static_cast<C*>(to)[c] = (C)total;
  }
}

// Calls kernel(begin, end, sums, scratch) on parts, and writes the (up to two) sums of every channel.
template <class Kernel>
void with_sums(const BiasActSite& s, const Threads& threads, void* first, void* second, Kernel&& kernel) {
  // A part has many elements of each channel, or the parts' sums would be as large as the tensor.
  int64_t length = std::max({kElementsPerThread, (s.count + kParts - 1) / kParts, 32 * s.channels});
  if (s.period) length = (length + s.period - 1) / s.period * s.period;
  const int64_t parts = std::max<int64_t>((s.count + length - 1) / length, 1), distance = 2 * s.channels;
  std::vector<double> sums(parts * distance);
  parallel_for(threads, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(2 * s.period * state_size(s.dtype));
    flushed_if_smooth(s.activation, [&] {
      for (int64_t p = begin; p < end; ++p) {
        kernel(p * length, std::min((p + 1) * length, s.count), sums.data() + p * distance, scratch.data());
      }
    });
  });
  const auto write = s.dtype == DType::f64 ? finish<double> : finish<float>;
  if (first) write(sums.data(), parts, distance, s.channels, first);
  if (second) write(sums.data() + s.channels, parts, distance, s.channels, second);
}

}  // namespace

void bias_act(const BiasActFwd& args, const Threads& threads) {
  BiasActFwd a = args;
  const Prepared prepared(a.site, false);
  without_sums(a.site, threads, [&](int64_t begin, int64_t end) { kernel_table()->bias_act_fwd(a, begin, end); });
}

void bias_act_bwd(const BiasActBwdArgs& args, const Threads& threads) {
  BiasActBwdArgs a = args;
  const bool summed = a.dbias || keeps_x(a.site.activation);
  const Prepared prepared(a.site, summed);
  if (!summed) {
    return without_sums(a.site, threads, [&](int64_t begin, int64_t end) {
      kernel_table()->bias_act_bwd(a, begin, end, nullptr, nullptr);
    });
  }
  with_sums(a.site, threads, a.dbias, a.dslope, [&](int64_t begin, int64_t end, double* sums, void* scratch) {
    kernel_table()->bias_act_bwd(a, begin, end, sums, scratch);
  });
}

void bias_act_bwd_bwd(const BiasActBwdBwdArgs& args, const Threads& threads) {
  BiasActBwdBwdArgs a = args;
  const bool summed = keeps_x(a.site.activation);
  Prepared prepared(a.site, summed);
  a.v_bias = prepared.parameter(a.v_bias);
  a.v_slope = prepared.parameter(a.v_slope);
  if (!summed) {
    return without_sums(a.site, threads, [&](int64_t begin, int64_t end) {
      kernel_table()->bias_act_bwd_bwd(a, begin, end, nullptr, nullptr);
    });
  }
  with_sums(a.site, threads, a.a_bias, a.a_slope, [&](int64_t begin, int64_t end, double* sums, void* scratch) {
    kernel_table()->bias_act_bwd_bwd(a, begin, end, sums, scratch);
  });
}

}  // namespace fuseblock::cpu
