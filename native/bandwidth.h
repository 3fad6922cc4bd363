// Measures how fast this machine reads memory, the ceiling of decode, and multiplies 8-bit integers,
// that of prefill.
#pragma once

#include <cstdint>
#include <string>

namespace deskside {

// Best bytes per second over `repeats` passes, each thread reading one contiguous part of `bytes`.
double read_bandwidth(int n_threads, int64_t bytes, int repeats);

// Best 8-bit products per second of n_threads with the kernels of `isa` ("" for the fastest).
double compute_limit(int n_threads, const std::string& isa, int repeats);

}  // namespace deskside
