// Random rounds of Team and Pool under ThreadSanitizer: every task runs once, the serial part sees all
// of a round's results, and a stop that is decided in a serial part ends all threads.
#include <cstdio>
#include <random>
#include <vector>

#include "thread_pool.h"

using namespace deskside;

int main() {
  std::mt19937 random(1);
  for (const int n_threads : {1, 2, 3, 5}) {
    Pool pool(n_threads);
    Team team(n_threads);
    uint32_t round = (uint32_t(1) << 24) - 500;  // wraps on the way
    for (int run = 0; run < 400; run++) {
      const size_t steps = 1 + random() % 6;
      std::vector<std::vector<int>> hits(steps);
      for (auto& h : hits) h.resize(random() % 4 == 0 ? 0 : random() % 60);
      bool wanted = false, stop = false;
      long wrong = 0;
      pool.run([&](int thread) {
        for (size_t i = 0;; i++) {
          if (thread == 0 && run % 37 == 36 && i == 1) wanted = true;
          team.barrier([&] {
            stop = wanted;
            if (i > 0)
              for (const int h : hits[i - 1]) wrong += h != 1;
          });
          if (i >= steps || stop) return;
          const uint32_t tag = (round + uint32_t(i)) % (uint32_t(1) << 24);
          team.share(tag, thread, int64_t(hits[i].size()), [&](int64_t k) { hits[i][size_t(k)]++; });
        }
      });
      if (wrong) return std::printf("%d threads: %ld tasks not run once\n", n_threads, wrong), 1;
      round = (round + uint32_t(steps)) % (uint32_t(1) << 24);
    }
  }
  std::printf("all tasks run once\n");
}
