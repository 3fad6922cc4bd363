// Measures three limits of this machine: the read bandwidth, which limits decode; the rate of
// products, which limits prefill; and the time of a barrier.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

namespace deskside {

// Memory that is read to measure its bandwidth. If `cpus` is not empty, thread t runs on
// cpus[t mod n].
class Reader {
 public:
  // The threads that read the memory also fill it. So its pages are on their NUMA nodes, unless
  // `kind` names others.
  Reader(int64_t bytes, const MemoryKind& kind, int n_threads, const std::vector<int>& cpus);

  // Best bytes per second of `repeats` passes. Each thread reads one contiguous part.
  double read(int n_threads, int repeats, const std::vector<int>& cpus) const;

  const Arena& memory() const { return memory_; }

 private:
  Arena memory_;
};

// Best products per second of n_threads with the kernels of `isa` ("" for the fastest). They are
// 8-bit products, or float32 products if `floats`.
double compute_limit(int n_threads, const std::string& isa, int repeats, bool floats);

// Seconds of a barrier of n_threads, measured for about `seconds`. It is the first octile over
// groups of twenty barriers.
double barrier_seconds(int n_threads, double seconds);

}  // namespace deskside
