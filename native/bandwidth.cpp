#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <sched.h>
#endif

#include "dispatch.h"
#include "thread_pool.h"

namespace deskside {
namespace {

void check(int n_threads, int64_t bytes, int repeats) {
  if (n_threads < 1 || bytes < (int64_t(1) << 20) || repeats < 1)
    throw std::invalid_argument("read_bandwidth: at least 1 thread, 1 MiB and 1 repeat");
}

// Pins the calling thread to one CPU while this object lives. A forbidden CPU is ignored.
class OnCpu {
 public:
  OnCpu([[maybe_unused]] const std::vector<int>& cpus, [[maybe_unused]] int thread) {
#if defined(__linux__)
    if (cpus.empty() || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpus[size_t(thread) % cpus.size()], &one);
    moved_ = sched_setaffinity(0, sizeof one, &one) == 0;
#endif
  }
  ~OnCpu() {
#if defined(__linux__)
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
#endif
  }
  OnCpu(const OnCpu&) = delete;
  OnCpu& operator=(const OnCpu&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool moved_ = false;
#endif
};

// The number of 8-byte words that each of n threads reads.
int64_t part_of(int64_t bytes, int n) { return bytes / 8 / n / 32 * 32; }

}  // namespace

Reader::Reader(int64_t bytes, const MemoryKind& kind, int n_threads, const std::vector<int>& cpus)
    : memory_((check(n_threads, bytes, 1), bytes), kind) {
  auto* data = reinterpret_cast<uint64_t*>(memory_.data());
  Pool pool(n_threads);
  pool.run([&](int t) {
    const OnCpu here(cpus, t);
    const int64_t words = bytes / 8, first = words * t / n_threads;
    std::fill(data + first, data + words * (t + 1) / n_threads, uint64_t(t) + 1);
  });
}

double Reader::read(int n_threads, int repeats, const std::vector<int>& cpus) const {
  check(n_threads, memory_.bytes(), repeats);
  const auto* data = reinterpret_cast<const uint64_t*>(memory_.data());
  const int64_t part = part_of(memory_.bytes(), n_threads);
  std::vector<uint64_t> sums(size_t(n_threads) * 8);
  Pool pool(n_threads);
  double best = 0;
  // The first pass only moves threads to their CPUs.
  for (int i = cpus.empty() ? 0 : -1; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) {
      const OnCpu here(cpus, t);
      const uint64_t *p = data + t * part, *end = p + part;
      // Independent sums, so that loads are the limit, not additions.
      uint64_t a[8] = {};
      for (; p < end; p += 8)
        for (int j = 0; j < 8; j++) a[j] += p[j];
      for (int j = 0; j < 8; j++) sums[size_t(t) * 8] += a[j];
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i >= 0) best = std::max(best, double(part) * 8 * n_threads / seconds.count());
  }
  // Using the sums keeps the compiler from removing the reads.
  if (sums[0] == 0) throw std::runtime_error("read_bandwidth: memory was not read");
  return best;
}

double compute_limit(int n_threads, const std::string& isa, int repeats, bool floats) {
  if (n_threads < 1 || repeats < 1)
    throw std::invalid_argument("compute_limit: at least 1 thread and 1 repeat");
  constexpr int64_t kRounds = 4'000'000;
  const Kernels& kernels = choose_kernels(isa);
  std::vector<int64_t> products(size_t(n_threads) * 8);
  std::vector<int32_t> results(size_t(n_threads) * 16);
  std::vector<float> float_results(size_t(n_threads) * 16);
  Pool pool(n_threads);
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) {
      products[size_t(t) * 8] = floats ? kernels.float_peak(kRounds, &float_results[size_t(t) * 16])
                                       : kernels.dot_peak(kRounds, &results[size_t(t) * 16]);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(products[0]) * n_threads / seconds.count());
  }
  return best;
}

double barrier_seconds(int n_threads, double seconds) {
  if (n_threads < 1 || !(seconds > 0))
    throw std::invalid_argument("barrier_seconds: at least 1 thread and some time");
  constexpr int kBatch = 20, kLeast = 16;
  Pool pool(n_threads);
  Team team(n_threads, [] { return 0L; });  // no thread is sent on leave
  std::vector<double> batches;
  int count = 0;
  bool stop = false;
  team.gather(n_threads);
  const double start = now_micros();
  double mark = start;
  pool.run([&](int t) {
    while (!stop)  // `stop` is written inside barriers
      team.barrier(t, [&] {
        if (++count % kBatch != 0) return;
        const double now = now_micros();
        batches.push_back((now - mark) / kBatch);
        mark = now;
        stop = int(batches.size()) >= kLeast && now - start > 1e6 * seconds;
      });
  });
  // Slower groups lost a core to another program meanwhile.
  const auto low = batches.begin() + long(batches.size() / 8);
  std::nth_element(batches.begin(), low, batches.end());
  return 1e-6 * *low;
}

}  // namespace deskside
