// A persistent pool whose threads walk a program together: barriers with a serial part, and tasks
// that are shared out in contiguous ranges.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deskside {

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Waits until done() holds: spins while every thread has a core, yields when one was taken away, and
// parks on `word`, whose value was `seen`, when the wait is long.
template <class T, class F> void wait_for(std::atomic<T>& word, T seen, F&& done) {
  for (int i = 0; !done(); i++) {
    if (i < 4000) cpu_relax();
    else if (i < 4200) std::this_thread::yield();
    else word.wait(seen, std::memory_order_acquire);
  }
}

// What the threads of one run share.
class Team {
 public:
  explicit Team(int n) : n_(n), ranges_(std::make_unique<Range[]>(size_t(n))) {}
  int size() const { return n_; }

  // Waits for all threads; the last to arrive runs serial() before it releases the others.
  template <class F> void barrier(F&& serial) {
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      serial();
      generation_.store(generation + 1, std::memory_order_release);
      if (n_ > 1) generation_.notify_all();
      return;
    }
    wait_for(generation_, generation,
             [&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

  // Calls f(task) for every task in [0, n) once. A thread first works through its own contiguous
  // range, so that it reads one stream, and then takes tasks off the ends of the others' ranges, so
  // that a core that was taken away holds nobody up. `round` must differ from that of the round
  // before and be the same for all threads. Ends without a barrier.
  template <class F> void share(uint32_t round, int thread, int64_t n, F&& f) {
    for (int64_t task; (task = take(round, thread, n, false)) >= 0;) f(task);
    for (int i = 1; i < n_; i++) {
      const int other = thread + i < n_ ? thread + i : thread + i - n_;
      for (int64_t task; (task = take(round, other, n, true)) >= 0;) f(task);
    }
  }

 private:
  // How many tasks of a thread's range are taken, from its front and from its back, in which round:
  // 24 bits of round, 20 bits each of counts (max_tokens is checked to fit).
  struct alignas(64) Range {
    std::atomic<uint64_t> taken{0};
  };

  int64_t take(uint32_t round, int thread, int64_t n, bool back) {
    constexpr uint64_t kCount = (uint64_t(1) << 20) - 1;
    const int64_t first = n * thread / n_, size = n * (thread + 1) / n_ - first;
    const uint64_t tag = uint64_t(round) << 40;
    std::atomic<uint64_t>& taken = ranges_[size_t(thread)].taken;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t now = seen >> 40 << 40 == tag ? seen : tag;
      const auto front = int64_t(now >> 20 & kCount), behind = int64_t(now & kCount);
      if (front + behind >= size) return -1;
      if (taken.compare_exchange_weak(seen, now + (back ? 1 : kCount + 1),
                                      std::memory_order_relaxed))
        return back ? first + size - 1 - behind : first + front;
    }
  }

  const int n_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::unique_ptr<Range[]> ranges_;
};
class Pool {
 public:
  explicit Pool(int n_threads) {
    try {
      for (int id = 1; id < n_threads; id++) threads_.emplace_back([this, id] { work(id); });
    } catch (...) {
      end();
      throw;
    }
  }

  ~Pool() { end(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // Runs f(thread id) on all threads, the caller's included, and returns when all are done.
  void run(const std::function<void(int)>& f) {
    job_ = &f;
    pending_.store(int(threads_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    f(0);
    for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;)
      wait_for(pending_, left, [&] { return pending_.load(std::memory_order_acquire) != left; });
  }

 private:
  void end() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& t : threads_) t.join();
  }

  void work(int id) {
    uint32_t seen = 0;
    for (;;) {
      // Spins through the short pause between two decode steps, then parks.
      for (int spins = 0; spins < 20000 && epoch_.load(std::memory_order_acquire) == seen; spins++)
        cpu_relax();
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      (*job_)(id);
      pending_.fetch_sub(1, std::memory_order_release);
      pending_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace deskside
