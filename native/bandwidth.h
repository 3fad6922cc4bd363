// Measures how fast this machine reads memory: the ceiling of decode speed.
#pragma once

#include <cstdint>

namespace deskside {

// Best bytes per second over `repeats` passes, each thread reading one contiguous part of `bytes`.
double read_bandwidth(int n_threads, int64_t bytes, int repeats);

}  // namespace deskside
