#include "spectral_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "kernel_table.h"

namespace fuseblock::cpu {

extern const SpectralKernels spectral_kernels_baseline;
#if defined(__x86_64__)
extern const SpectralKernels spectral_kernels_avx2, spectral_kernels_avx512;
#endif

namespace {

// Elements of a unit of work, and fewest rows: the images of its units are added up, which must cost little beside them.
// Units do not depend on the number of threads, so that the same weights give the same bits in every process.
constexpr int64_t kUnit = 1 << 15, kUnitRows = 16;
constexpr int64_t kGrain = 2;  // units that a thread is woken for

const SpectralKernels& spectral_kernels() {
#if defined(__x86_64__)
  switch (kernel_table()->vector_bytes) {
    case 64: return spectral_kernels_avx512;
    case 32: return spectral_kernels_avx2;
  }
#endif
  return spectral_kernels_baseline;
}

struct Unit {
  int64_t matrix, begin, end;
  int64_t image;  // where its image is, in elements
};

struct Plan {
  std::vector<Unit> units;
  std::vector<int64_t> first;  // of every matrix, and the end
  int64_t image_elements = 0;

  explicit Plan(const std::vector<SpectralMatrix>& matrices) {
    for (size_t i = 0; i < matrices.size(); ++i) {
      const SpectralMatrix& m = matrices[i];
      first.push_back((int64_t)units.size());
      const int64_t step = std::max(kUnitRows, kUnit / std::max<int64_t>(m.columns(), 1));
      for (int64_t r = 0; r < m.rows; r += step) {
        units.push_back({(int64_t)i, r, std::min(m.rows, r + step), image_elements});
        image_elements += m.columns();
      }
    }
    first.push_back((int64_t)units.size());
  }

  int64_t count() const { return (int64_t)units.size(); }
};

// f(unit, its number) of every unit.
template <class F>
void for_units(const Plan& plan, const Threads& threads, F&& f) {
  parallel_for(threads, plan.count(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(plan.units[k], k);
  });
}

template <class S>
double dot(const S* a, const S* b, int64_t n) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int j = 0; j < 8; ++j) sums[j] += (double)a[k + j] * b[k + j];
  for (; k < n; ++k) sums[k % 8] += (double)a[k] * b[k];
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// x / max(|x|, eps) in place; returns the divisor.
template <class S>
S normalize(S* x, int64_t n, double eps) {
  const double norm = std::sqrt(dot(x, x, n));
  const S divisor = norm < eps ? (S)eps : (S)norm;
  for (int64_t k = 0; k < n; ++k) x[k] /= divisor;
  return divisor;
}

// From the products W v, which lie in u, and the images of the units: u, v and sigma.
template <class S>
void finish(const SpectralMatrix& m, const Plan& plan, int64_t i, S* images, double eps) {
  S *u = static_cast<S*>(m.u), *v = static_cast<S*>(m.v), *sigma = static_cast<S*>(m.sigma);
  const int64_t n = m.columns();
  const S divisor = normalize(u, m.rows, eps);
  if (plan.first[i] == plan.first[i + 1]) return;
  S* image = images + plan.units[plan.first[i]].image;
  for (int64_t k = plan.first[i] + 1; k < plan.first[i + 1]; ++k) {
    const S* part = images + plan.units[k].image;
    for (int64_t j = 0; j < n; ++j) image[j] += part[j];
  }
  for (int64_t j = 0; j < n; ++j) v[j] = image[j] = image[j] / divisor;
  normalize(v, n, eps);
  *sigma = (S)dot(image, v, n);
}

template <class S>
void run(const std::vector<SpectralMatrix>& matrices, DType dtype, int64_t iterations, double eps, const Threads& threads) {
  const SpectralKernels& kernels = spectral_kernels();
  const Plan plan(matrices);
  const auto count = (int64_t)matrices.size();
  const std::unique_ptr<S[]> images(iterations ? new S[plan.image_elements] : nullptr);
  for (int64_t n = 0; n < iterations; ++n) {
    for_units(plan, threads, [&](const Unit& unit, int64_t) {
      const SpectralMatrix& m = matrices[unit.matrix];
      kernels.product(m, dtype, m.u, images.get() + unit.image, unit.begin, unit.end);
    });
    parallel_for(threads, count, 1 + count / 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(matrices[i], plan, i, images.get(), eps);
    });
  }
  if (!iterations) {
    for (const SpectralMatrix& m : matrices) {
      const std::unique_ptr<S[]> products(new S[m.rows]);
      kernels.product(m, dtype, products.get(), nullptr, 0, m.rows);
      *static_cast<S*>(m.sigma) = (S)dot(static_cast<const S*>(m.u), products.get(), m.rows);
    }
  }
  for_units(plan, threads, [&](const Unit& unit, int64_t) {
    kernels.scale(matrices[unit.matrix], dtype, unit.begin, unit.end);
  });
}

}  // namespace

void spectral_norm(const std::vector<SpectralMatrix>& matrices, DType dtype, int64_t n_power_iterations, double eps,
                   const Threads& threads) {
  const auto run_for = dtype == DType::f64 ? run<double> : run<float>;
  run_for(matrices, dtype, n_power_iterations, eps, threads);
}

void spectral_norm_bwd(const std::vector<SpectralMatrix>& matrices, DType dtype, const Threads& threads) {
  const SpectralKernels& kernels = spectral_kernels();
  const Plan plan(matrices);
  std::vector<double> parts(plan.count()), inner(matrices.size());
  for_units(plan, threads, [&](const Unit& unit, int64_t k) {
    parts[k] = kernels.inner(matrices[unit.matrix], dtype, unit.begin, unit.end);
  });
  for (int64_t k = 0; k < plan.count(); ++k) inner[plan.units[k].matrix] += parts[k];
  for_units(plan, threads, [&](const Unit& unit, int64_t) {
    kernels.gradient(matrices[unit.matrix], dtype, inner[unit.matrix], unit.begin, unit.end);
  });
}

}  // namespace fuseblock::cpu
