// Random rounds of Team and Pool under ThreadSanitizer: every task runs once, the serial part sees
// all of a round's results, a stop that is decided in a serial part ends all threads, threads that
// hold the others up go on leave and come back. Then Roster alone, by a clock of its own.
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "thread_pool.h"

using namespace deskside;

namespace {
constexpr uint32_t kRounds = uint32_t(1) << 24;

#define CHECK(condition) \
  if (!(condition)) return std::printf("line %d: %s\n", __LINE__, #condition), 1

thread_local long switches = 0;
long more_switches() { return ++switches; }

int rounds(int n_threads, bool late) {
  std::mt19937 random(1);
  Pool pool(n_threads);
  Team team(n_threads, more_switches);
  uint32_t round = kRounds - 500;  // wraps on the way
  int leaves = 0;
  std::vector<char> here(size_t(n_threads), 1);
  for (int run = 0; run < 400; run++) {
    const size_t steps = 1 + random() % 6;
    std::vector<std::vector<int>> hits(steps);
    for (auto& h : hits) h.resize(random() % 4 == 0 ? 0 : random() % 60);
    bool wanted = false, stop = false;
    long wrong = 0;
    const int size = run % 3 == 0 ? 1 + int(random() % unsigned(n_threads)) : n_threads;
    team.gather(size);
    int taking = 0;
    for (int i = 0; i < n_threads; i++) taking += here[size_t(i)] = team.takes_part(i);
    CHECK(taking >= 1 && taking <= size);
    const auto walk = [&](int thread) {
      for (size_t i = 0;; i++) {
        if (thread == 0 && run % 37 == 36 && i == 1) wanted = true;
        if (late && thread == run / 100 % n_threads)
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
        const bool stays = team.barrier(thread, [&] {
          stop = wanted;
          if (i > 0)
            for (const int h : hits[i - 1]) wrong += h != 1;
        });
        if (!stays) return;
        if (i >= steps || stop) return;
        const uint32_t tag = (round + uint32_t(i)) % kRounds;
        team.share(tag, thread, int64_t(hits[i].size()), [&](int64_t k) { hits[i][size_t(k)]++; });
      }
    };
    pool.run(walk, [&](int thread) { return team.takes_part(thread); });
    for (int i = 0; i < n_threads; i++)
      if (here[size_t(i)] && !team.takes_part(i)) here[size_t(i)] = 0, leaves++;
    CHECK(wrong == 0);
    round = (round + uint32_t(steps)) % kRounds;
  }
  if (n_threads < 4) CHECK(leaves == 0);  // with more it is a matter of the machine
  if (leaves > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2100));  // the longest leave
    team.gather(n_threads);
    for (int i = 0; i < n_threads; i++) CHECK(team.takes_part(i));
  }
  return 0;
}

// Milliseconds on leave within two seconds for thread 1, which holds the others up for `late` out
// of every 6 ms and loses its core or not.
double on_leave(Roster& roster, double from, double late, bool stolen) {
  double away = 0;
  static long count = 0;  // over all rosters, as a thread's past
  for (double t = from; t < from + 2e6; t += 6e3) {
    roster.gather(t, roster.size());
    if (roster.rank(1) < 0)
      away += 6;
    else if (late > 0)
      roster.late(1, t, late, stolen ? ++count : count);
  }
  return away;
}

int roster() {
  for (const int n : {4, 16}) {
    Roster r(n);
    CHECK(on_leave(r, 0, 0, true) == 0);
    CHECK(on_leave(r, 2e6, 3e3, false) == 0);   // slow of itself
    CHECK(on_leave(r, 4e6, 3e3, true) > 1500);  // half its time
    CHECK(r.active() >= n - 1);
    on_leave(r, 6e6, 0, true);
    CHECK(r.active() == n);                               // back when the other program has gone
    if (n == 4) CHECK(on_leave(r, 9e6, 600, true) == 0);  // a tenth: worth more than a leave
  }
  Roster all(4);
  for (int i = 1; i < 100; i++)
    for (int thread = 0; thread < 4; thread++)
      if (all.rank(thread) >= 0) all.late(thread, i * 5e3, 4e3, i);
  CHECK(all.active() == 2);  // never less than half
  for (int thread = 0, next = 0; thread < 4; thread++)
    if (all.rank(thread) >= 0) CHECK(all.rank(thread) == next++);
  // A run of two takes the threads that are not on leave; all are back later.
  all.gather(60e3, 2);
  CHECK(all.active() == 2 && all.rank(0) == -1 && all.rank(1) == -1 && all.rank(3) == 1);
  all.gather(500e3, 2);
  CHECK(all.active() == 2 && !all.late(0, 501e3, 4e3, 200));
  all.gather(502e3, 1);
  CHECK(all.active() == 1);
  all.gather(1e9, 3);
  CHECK(all.active() == 3 && all.rank(2) == 2 && all.rank(3) == -1);
  all.gather(1e9, 4);
  CHECK(all.active() == 4);
  Roster alone(1);
  for (int i = 1; i < 100; i++) CHECK(!alone.late(0, i * 5e3, 4e3, i));
  return 0;
}
}  // namespace

int main() {
  for (const int n_threads : {1, 2, 3, 5})
    for (const bool late : {false, true})
      if (rounds(n_threads, late)) return 1;
  if (roster()) return 1;
  std::printf("all tasks run once\n");
}
