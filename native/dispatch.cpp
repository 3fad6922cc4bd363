#include "dispatch.h"

#include <stdexcept>

namespace deskside {

std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets = {{&kernels_scalar, true}};
#if defined(DESKSIDE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#if defined(DESKSIDE_EMULATE_AVX512)
  // The slowest, so it is never selected by speed.
  sets.insert(sets.begin(), {&kernels_avx512_emulated, avx2});
#endif
  sets.push_back({&kernels_avx2, avx2});
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  sets.push_back({&kernels_avx512, avx512});
#endif
  return sets;
}

const Kernels& choose_kernels(const std::string& name) {
  const Kernels* best = nullptr;
  std::string known;
  for (const Isa& isa : instruction_sets()) {
    known += (known.empty() ? "" : ", ") + std::string(isa.kernels->name);
    if (name == isa.kernels->name) {
      if (!isa.supported)
        throw std::invalid_argument("instruction set " + name + " is not supported by this CPU");
      return *isa.kernels;
    }
    if (isa.supported) best = isa.kernels;
  }
  if (!name.empty())
    throw std::invalid_argument("instruction set " + name + " is not compiled in; choose one of " +
                                known);
  return *best;
}

}  // namespace deskside
