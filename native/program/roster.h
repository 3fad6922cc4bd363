// Decides which threads of a team take part. If another program shares a core with a thread, all
// threads wait for that one at every barrier. With half a core, it halves the speed of the whole
// team. Such a thread is sent on leave, and the others do its share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace deskside {

// Times are in microseconds. It is not synchronised: Team calls it while no other thread reads it.
class Roster {
 public:
  // The shortest wait that counts. It is longer than a task at decode, and shorter than a time
  // slice.
  static constexpr double kLate = 300;

  explicit Roster(int n) : threads_(size_t(n)), wanted_(n) { number(); }

  int size() const { return int(threads_.size()); }
  int active() const { return active_; }
  // The thread's index among those that take part, or -1.
  int rank(int thread) const { return threads_[size_t(thread)].rank; }

  // Before a run: `wanted` threads take part, fewer if too many are on leave. Threads whose leave
  // is over may take part again.
  void gather(double now, int wanted) {
    wanted_ = wanted;
    int chosen = 0;
    for (Thread& t : threads_) {
      if (t.on_leave && now >= t.until) {
        t.on_leave = false;
        t.back = now;
        t.lost = 0;
        away_--;
      }
      t.rank = !t.on_leave && chosen < wanted ? chosen++ : -1;
    }
    active_ = chosen;
  }

  // Reports that the others waited `late` microseconds for `thread`, until `now`. `switches` counts
  // how often it has lost its core so far. Returns whether the thread goes on leave.
  //
  // It does if the share of recent time that it cost exceeds about the value of its work, one part
  // in `active`. The limit is lower (0.6 parts): fewer threads get more bandwidth each, and the
  // other program gains as well. One wait is never enough.
  bool late(int thread, double now, double late, long switches) {
    Thread& t = threads_[size_t(thread)];
    const bool stolen = t.switches >= 0 && switches > t.switches;
    t.switches = switches;
    if (!stolen) return false;
    t.lost = t.lost * std::exp((t.seen - now) / kWindow) + late;
    t.seen = now;
    const double share = std::max(0.1, 0.6 / active_);
    // With two or three threads, none leaves: the others would gain no more than they lose. At
    // least half of the run's threads stay, and half of all.
    if (wanted_ < 4 || t.lost < share * kWindow || active_ <= (wanted_ + 1) / 2 ||
        away_ >= size() / 2)
      return false;
    // It was back for a shorter time than away, so the other program still runs: stay away longer.
    t.leave = now - t.back < t.leave ? std::min(2 * t.leave, kLongest) : kShortest;
    t.until = now + t.leave;
    t.on_leave = true;
    away_++;
    t.rank = -1;
    number();
    return true;
  }

 private:
  static constexpr double kWindow = 50e3, kShortest = 100e3, kLongest = 2e6;

  struct Thread {
    int rank = 0;
    bool on_leave = false;
    long switches = -1;         // at the last look
    double lost = 0, seen = 0;  // time waited for this thread, decayed over kWindow; last update
    double leave = kShortest, until = 0, back = -1e300;
  };

  void number() {
    active_ = 0;
    for (Thread& t : threads_)
      if (t.rank >= 0) t.rank = active_++;
  }

  std::vector<Thread> threads_;
  int wanted_;  // in this run
  int active_ = 0;
  int away_ = 0;  // on leave
};

}  // namespace deskside
