// Which threads of a team take part. When another program shares a core with one of them, all wait
// for that one at every barrier while it has not got the core: at half a core that halves the speed
// of the whole team. A thread that keeps the others waiting in this way is sent on leave, and the
// others do its share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace deskside {

// Times in microseconds. Not synchronised: Team calls it while no other thread can look.
class Roster {
 public:
  // A wait that is worth a look. Longer than a task of a decode step, shorter than a time slice.
  static constexpr double kLate = 300;

  explicit Roster(int n) : threads_(size_t(n)) { number(); }

  int active() const { return active_; }
  // Place among those who take part, or -1 for a thread on leave.
  int rank(int thread) const { return threads_[size_t(thread)].rank; }

  // Before a run: those whose leave is over come back.
  void gather(double now) {
    for (Thread& t : threads_) {
      if (t.rank >= 0 || now < t.until) continue;
      t.rank = 0;
      t.back = now;
      t.lost = 0;
    }
    number();
  }

  // `thread` let the others wait for `late` microseconds until `now`; `switches` counts how often
  // it has lost its core so far. Returns whether it goes on leave: when the share of the last time
  // that it cost is more than what its work is worth, one part in `active`. Less is enough, as
  // fewer threads read more bandwidth each and the other program gains as well; once is never
  // enough.
  bool late(int thread, double now, double late, long switches) {
    Thread& t = threads_[size_t(thread)];
    const bool stolen = t.switches >= 0 && switches > t.switches;
    t.switches = switches;
    if (!stolen) return false;
    t.lost = t.lost * std::exp((t.seen - now) / kWindow) + late;
    t.seen = now;
    const double share = std::max(0.1, 0.6 / active_);
    // Of two or three threads none: the others would gain no more than they lose.
    const int n = int(threads_.size());
    if (n < 4 || t.lost < share * kWindow || active_ <= (n + 1) / 2) return false;
    // Back for less than it was away: the other program is still there.
    t.leave = now - t.back < t.leave ? std::min(2 * t.leave, kLongest) : kShortest;
    t.until = now + t.leave;
    t.rank = -1;
    number();
    return true;
  }

 private:
  static constexpr double kWindow = 50e3, kShortest = 100e3, kLongest = 2e6;

  struct Thread {
    int rank = 0;
    long switches = -1;         // at the last look
    double lost = 0, seen = 0;  // by waiting for this thread, faded over kWindow
    double leave = kShortest, until = 0, back = -1e300;
  };

  void number() {
    active_ = 0;
    for (Thread& t : threads_)
      if (t.rank >= 0) t.rank = active_++;
  }

  std::vector<Thread> threads_;
  int active_ = 0;
};

}  // namespace deskside
