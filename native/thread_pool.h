// A persistent pool whose threads run one function together, with barriers and shared task counters.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
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

// What the threads of one run share. Between two barriers at most one `for_each` is in progress:
// the last thread to reach a barrier resets the task counter.
class Team {
 public:
  explicit Team(int n) : n_(n) {}
  int size() const { return n_; }

  void barrier() {
    if (n_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    // Spinning is right while every thread has a core; when one was taken away, yield to it.
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
      if (spins < 2000) cpu_relax();
      else std::this_thread::yield();
    }
  }

  // Calls f(task) for every task in [0, n), each on whichever thread is free. Ends without a barrier.
  template <class F> void for_each(int64_t n, F&& f) {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= n) return;
      f(task);
    }
  }

 private:
  const int n_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

class Pool {
 public:
  explicit Pool(int n_threads) {
    for (int id = 1; id < n_threads; id++) threads_.emplace_back([this, id] { work(id); });
  }

  ~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& t : threads_) t.join();
  }

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
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; spins++) {
      if (spins < 2000) cpu_relax();
      else std::this_thread::yield();
    }
  }

 private:
  void work(int id) {
    uint32_t seen = 0;
    for (;;) {
      // Spin through the short pause between two decode steps, then park.
      for (int spins = 0; spins < 20000 && epoch_.load(std::memory_order_acquire) == seen; spins++)
        cpu_relax();
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      (*job_)(id);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace deskside
