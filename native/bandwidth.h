// Measures how fast this machine reads memory, the ceiling of decode, multiplies, that of prefill,
// and lets threads wait for each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

namespace deskside {

// Memory that is read to measure its bandwidth. `cpus`, where given: thread t runs on cpus[t mod
// n].
class Reader {
 public:
  // Threads that will read it fill it, so that its pages lie where they run unless `kind` says
  // where.
  Reader(int64_t bytes, const MemoryKind& kind, int n_threads, const std::vector<int>& cpus);

  // Best bytes per second over `repeats` passes, each thread reading one contiguous part.
  double read(int n_threads, int repeats, const std::vector<int>& cpus) const;

  const Arena& memory() const { return memory_; }

 private:
  Arena memory_;
};

// Best 8-bit or, with `floats`, float32 products per second of n_threads with the kernels of `isa`
// ("" for the fastest).
double compute_limit(int n_threads, const std::string& isa, int repeats, bool floats);

// Seconds of a barrier of n_threads, measured for about `seconds`: the first octile of twenties.
double barrier_seconds(int n_threads, double seconds);

}  // namespace deskside
