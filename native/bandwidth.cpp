#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "pack.h"
#include "thread_pool.h"

namespace deskside {

double read_bandwidth(int n_threads, int64_t bytes, int repeats) {
  if (n_threads < 1 || bytes < (int64_t(1) << 20) || repeats < 1)
    throw std::invalid_argument("read_bandwidth: at least 1 thread, 1 MiB and 1 repeat");
  const Arena memory(bytes);
  auto* data = reinterpret_cast<uint64_t*>(memory.data());
  const int64_t part = bytes / 8 / n_threads / 32 * 32;
  std::vector<uint64_t> sums(size_t(n_threads) * 8);
  Pool pool(n_threads);
  pool.run([&](int t) { std::fill(data + t * part, data + (t + 1) * part, uint64_t(t) + 1); });

  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) {
      const uint64_t *p = data + t * part, *end = p + part;
      // Independent sums, so that loads and not additions are the limit.
      uint64_t a[8] = {};
      for (; p < end; p += 8)
        for (int j = 0; j < 8; j++) a[j] += p[j];
      for (int j = 0; j < 8; j++) sums[size_t(t) * 8] += a[j];
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(part) * 8 * n_threads / seconds.count());
  }
  // The sums are used, so the reads cannot be left out.
  if (sums[0] == 0) throw std::runtime_error("read_bandwidth: memory was not read");
  return best;
}

double compute_limit(int n_threads, const std::string& isa, int repeats) {
  if (n_threads < 1 || repeats < 1)
    throw std::invalid_argument("compute_limit: at least 1 thread and 1 repeat");
  constexpr int64_t kRounds = 4'000'000;
  const Kernels& kernels = choose_kernels(isa);
  std::vector<int64_t> products(size_t(n_threads) * 8);
  std::vector<int32_t> results(size_t(n_threads) * 16);
  Pool pool(n_threads);
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) {
      products[size_t(t) * 8] = kernels.dot_peak(kRounds, &results[size_t(t) * 16]);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(products[0]) * n_threads / seconds.count());
  }
  return best;
}

}  // namespace deskside
