#include "program.h"

#include <algorithm>
#include <chrono>

#include "dispatch.h"

namespace deskside {

namespace {
int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }
}  // namespace

Program::Program(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa)
    : kernels_(choose_kernels(isa)),
      max_tokens_(max_tokens),
      pool_(n_threads),
      arena_(size_t(arena_floats)) {}

void Program::finish() {
  int64_t scratch = 0, cols = 32;
  for (const auto& op : ops_) {
    scratch = std::max(scratch, op->scratch_bytes(max_tokens_, pool_.size()));
    cols = std::max(cols, op->max_cols());
  }
  scratch_.resize(size_t(scratch));
  // kTileRows rows: of int8 with a scale per 16 weights and a minimum per 32, and of floats.
  const int64_t w = align64(kTileRows * cols), scale = align64(kTileRows * cols / 16 * 4),
                min = align64(kTileRows * cols / 32 * 4), f = align64(kTileRows * cols * 4);
  const int64_t each = w + scale + min + f;
  tiles_.resize(size_t(each * pool_.size() + 64));
  auto base = reinterpret_cast<uint8_t*>(align64(reinterpret_cast<intptr_t>(tiles_.data())));
  for (int i = 0; i < pool_.size(); i++, base += each)
    tile_.push_back({reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(base + w),
                     reinterpret_cast<float*>(base + w + scale),
                     reinterpret_cast<float*>(base + w + scale + min)});
}

bool Program::run(const Batch& batch, std::vector<double>* micros,
                  const std::function<bool()>& interrupted) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kPatience = std::chrono::milliseconds(50);
  bool stop = false;  // written by thread 0 before a barrier, read by all behind it
  if (micros) micros->assign(ops_.size(), 0);
  Team team(pool_.size());
  pool_.run([&](int thread) {
    const Run r{kernels_, *this, team, batch, thread};
    auto before = Clock::now(), asked = before;
    for (size_t i = 0; i < ops_.size() && !stop; i++) {
      ops_[i]->run(r);
      if (thread == 0 && Clock::now() - asked > kPatience) {
        if (interrupted()) stop = true;
        asked = Clock::now();
      }
      team.barrier();
      if (micros && thread == 0) {
        const auto now = Clock::now();
        (*micros)[i] = std::chrono::duration<double, std::micro>(now - before).count();
        before = now;
      }
    }
  });
  return !stop;
}

}  // namespace deskside
