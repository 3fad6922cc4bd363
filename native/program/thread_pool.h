// A persistent pool of threads that run a program together. Barriers have a serial part, and tasks
// are shared in contiguous ranges.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/resource.h>
#endif

#include "roster.h"

namespace deskside {

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Waits until done() holds. It spins at first, as is best while every thread has a core. Then it
// yields, and on a long wait it parks on `word`, whose value was `seen`.
template <class T, class F> void wait_for(std::atomic<T>& word, T seen, F&& done) {
  for (int i = 0; !done(); i++) {
    if (i < 4000)
      cpu_relax();
    else if (i < 4200)
      std::this_thread::yield();
    else
      word.wait(seen, std::memory_order_acquire);
  }
}

inline double now_micros() {
  using namespace std::chrono;
  return duration<double, std::micro>(steady_clock::now().time_since_epoch()).count();
}

// How often the calling thread has lost its core to another program.
inline long lost_core() {
#if defined(__linux__)
  rusage use;
  if (getrusage(RUSAGE_THREAD, &use) == 0) return use.ru_nivcsw;
#endif
  return 0;
}

// The barrier and the tasks that the threads of a run share.
class Team {
 public:
  // switches(): how often the calling thread has lost its core.
  explicit Team(int n, long (*switches)() = lost_core)
      : roster_(n), switches_(switches), ranges_(std::make_unique<Range[]>(size_t(n))) {}

  // Call it before a run of `wanted` threads. takes_part then says which threads run.
  void gather(int wanted) { roster_.gather(now_micros(), wanted); }
  bool takes_part(int thread) const { return roster_.rank(thread) >= 0; }

  // Waits for all threads that take part. The last to arrive runs serial(), then releases the
  // others. Returns false if the calling thread is on leave for the rest of the run (roster.h).
  template <class F> bool barrier(int thread, F&& serial) {
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    const int others = roster_.active() - 1;  // read before the arrival: the last one may change it
    const double now = now_micros(), before = arrival_.exchange(now, std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == others) {
      arrived_.store(0, std::memory_order_relaxed);
      const bool leaves = others > 0 && now - before > Roster::kLate &&
                          roster_.late(thread, now, now - before, switches_());
      serial();
      generation_.store(generation + 1, std::memory_order_release);
      generation_.notify_all();
      return !leaves;
    }
    wait_for(generation_, generation,
             [&] { return generation_.load(std::memory_order_acquire) != generation; });
    return true;
  }

  // Calls f(task) once for every task in [0, n). A thread first runs its own contiguous range, so
  // it reads one stream. Then it takes tasks from the ends of the others' ranges. So if the kernel
  // preempts a thread, the others wait at most for the one task it holds.
  // `round` must be the same for all threads, and differ from the previous one. There is no barrier
  // at the end.
  template <class F> void share(uint32_t round, int thread, int64_t n, F&& f) {
    const int own = roster_.rank(thread), parts = roster_.active();
    for (int64_t task; (task = take(round, own, parts, n, false)) >= 0;) f(task);
    for (int i = 1; i < parts; i++) {
      const int other = own + i < parts ? own + i : own + i - parts;
      for (int64_t task; (task = take(round, other, parts, n, true)) >= 0;) f(task);
    }
  }

 private:
  // How many tasks of a range are taken, in 64 bits: 24 bits of the round, 20 bits of the count
  // from the front, 20 bits of the count from the back. max_tokens is checked to fit.
  struct alignas(64) Range {
    std::atomic<uint64_t> taken{0};
  };

  int64_t take(uint32_t round, int part, int parts, int64_t n, bool back) {
    constexpr uint64_t kCount = (uint64_t(1) << 20) - 1;
    const int64_t first = n * part / parts, size = n * (part + 1) / parts - first;
    const uint64_t tag = uint64_t(round) << 40;
    std::atomic<uint64_t>& taken = ranges_[size_t(part)].taken;
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

  Roster roster_;
  long (*switches_)();
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<double> arrival_{0};  // the latest
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::unique_ptr<Range[]> ranges_;
};

class Pool {
 public:
  explicit Pool(int n_threads) : workers_(std::make_unique<Worker[]>(size_t(n_threads))) {
    try {
      for (; size_ < n_threads; size_++)
        workers_[size_t(size_)].thread = std::thread([this, id = size_] { work(id); });
    } catch (...) {
      end();
      throw;
    }
  }

  ~Pool() { end(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs f(thread id) on all threads, the caller's included, and returns when all are done.
  void run(const std::function<void(int)>& f) {
    run(f, [](int) { return true; });
  }

  // The same, on the threads for which takes_part(id) holds.
  template <class P> void run(const std::function<void(int)>& f, P&& takes_part) {
    job_ = &f;
    int others = 0;
    for (int id = 0; id < size_; id++) {
      workers_[size_t(id)].wanted = takes_part(id);
      others += id > 0 && workers_[size_t(id)].wanted;
    }
    pending_.store(others, std::memory_order_relaxed);
    for (int id = 1; id < size_; id++)
      if (workers_[size_t(id)].wanted) workers_[size_t(id)].call();
    if (workers_[0].wanted) f(0);
    for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;)
      wait_for(pending_, left, [&] { return pending_.load(std::memory_order_acquire) != left; });
  }

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> calls{0};
    bool wanted = false;  // in this run; the caller's
    std::thread thread;

    void call() {
      calls.fetch_add(1, std::memory_order_release);
      calls.notify_one();
    }
  };

  void end() {
    stop_.store(true);
    for (int id = 1; id < size_; id++) {
      workers_[size_t(id)].call();
      workers_[size_t(id)].thread.join();
    }
  }

  void work(int id) {
    std::atomic<uint32_t>& calls = workers_[size_t(id)].calls;
    for (uint32_t seen = 0;; seen++) {
      // Spins through the short pause between two decode steps, then parks.
      for (int spins = 0; spins < 20000 && calls.load(std::memory_order_acquire) == seen; spins++)
        cpu_relax();
      calls.wait(seen, std::memory_order_acquire);
      if (stop_.load()) return;
      (*job_)(id);
      pending_.fetch_sub(1, std::memory_order_release);
      pending_.notify_one();
    }
  }

  std::unique_ptr<Worker[]> workers_;  // 0 is the caller
  int size_ = 1;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace deskside
