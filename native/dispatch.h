// Lists the instruction sets that were compiled in, and selects one that this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace deskside {

struct Isa {
  const Kernels* kernels;
  bool supported;
};

// Compiled instruction sets, slowest first.
std::vector<Isa> instruction_sets();

// The fastest supported set for an empty name. Throws std::invalid_argument for a name that was not
// compiled in or that this machine cannot run.
const Kernels& choose_kernels(const std::string& name);

}  // namespace deskside
