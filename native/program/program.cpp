#include "program.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "dispatch.h"

namespace deskside {

namespace {
// Floats that one thread computes in about the time of a barrier and its imbalance.
constexpr int64_t kSerialWork = 32768;
constexpr uint32_t kRounds = uint32_t(1) << 24;
}  // namespace

void WorkMemory::add(const Op& op, int64_t max_tokens) {
  shared = std::max(shared, op.shared_bytes(max_tokens));
  floats = std::max(floats, op.work_floats(max_tokens));
  cols = std::max(cols, op.max_cols());
}

float* WorkMemory::take(Carver& carver, Tile& tile) const {
  float* work = carver.take<float>(floats);
  for (Tile::Unpacked& p : tile.panel) {
    p.w = carver.take<int8_t>(kPanelRows * cols);
    p.scale = carver.take<float>(cols / 16 * kPanelRows);
    p.min = carver.take<float>(cols / 16 * kPanelRows);
  }
  tile.f = carver.take<float>(kFloatRows * cols);
  return work;
}

int64_t WorkMemory::bytes(int n_threads) const {
  Carver all(nullptr), each(nullptr);
  Tile tile;
  all.take<uint8_t>(shared);
  take(each, tile);
  return all.used() + each.used() * n_threads;
}

Program::Program(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa)
    : kernels_(choose_kernels(isa)),
      max_tokens_(max_tokens),
      pool_(n_threads),
      team_(n_threads),
      arena_(arena_floats * 4) {}

void Program::finish() {
  WorkMemory need;
  for (Step& step : steps_) {
    if (step.ops.size() > kMaxTasksOps && step.kind == Step::kTasks)
      throw std::invalid_argument("finish: too many ops in a step of tasks");
    for (const auto& op : step.ops) {
      step.row_work += op->row_work();
      need.add(*op, max_tokens_);
    }
  }
  memory_ = std::make_unique<Arena>(need.bytes(pool_.size()));
  Carver carver(memory_->data());
  carver.take<uint8_t>(need.shared);
  for (int i = 0; i < pool_.size(); i++) work_.push_back(need.take(carver, tile_.emplace_back()));
}

int64_t Program::rows(const Step& step, const Batch& batch) const {
  if (step.kind == Step::kOnce) return 1;
  return int64_t(step.kind == Step::kOutputs ? batch.outputs.size() : batch.tokens.size());
}

bool Program::serial(const Step& step, const Batch& batch) const {
  if (step.kind == Step::kTasks) return false;
  const int64_t n = rows(step, batch);
  return n <= 1 || n * step.row_work <= kSerialWork;
}

void Program::run_rows(const Step& step, const Run& r, int64_t row) const {
  for (const auto& op : step.ops) op->row(r, row);
}

bool Program::run(const Batch& batch, int threads, size_t begin, size_t end,
                  std::vector<double>* micros, const std::function<bool()>& interrupted) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kPatience = std::chrono::milliseconds(50);
  const size_t n = end - begin;
  const Step* const steps = steps_.data() + begin;
  std::vector<char> alone(n);
  for (size_t i = 0; i < n; i++) alone[i] = serial(steps[i], batch);
  if (micros) micros->assign(n, 0);
  // Whether to stop. Thread 0 writes it, and barriers read it. While thread 0 is on leave, no
  // thread asks.
  bool wanted = false;
  bool stop = false;         // written inside barriers, read after them
  auto mark = Clock::now();  // the time of the last arrival at a barrier
  const auto lap = [&](size_t step) {
    const auto now = Clock::now();
    if (micros) (*micros)[step] += std::chrono::duration<double, std::micro>(now - mark).count();
    mark = now;
  };
  const uint32_t first_round = round_;
  round_ = (round_ + uint32_t(n)) % kRounds;

  team_.gather(threads);
  const auto walk = [&](int thread) {
    const Run r{kernels_, *this, batch, thread, threads};
    auto asked = Clock::now();
    for (size_t i = 0;; i++) {
      if (thread == 0 && Clock::now() - asked > kPatience) {
        if (interrupted()) wanted = true;
        asked = Clock::now();
      }
      const bool stays = team_.barrier(thread, [&] {
        stop = wanted;
        if (micros && i > 0) lap(i - 1);
        for (size_t j = i; j < n && alone[j] && !stop; j++) {
          const int64_t rows = this->rows(steps[j], batch);
          for (int64_t row = 0; row < rows; row++) run_rows(steps[j], r, row);
          if (micros) lap(j);
        }
      });
      if (!stays) return;
      while (i < n && alone[i]) i++;
      if (i >= n || stop) return;
      const Step& step = steps[i];
      const uint32_t round = (first_round + uint32_t(i)) % kRounds;
      if (step.kind != Step::kTasks) {
        team_.share(round, thread, rows(step, batch), [&](int64_t row) { run_rows(step, r, row); });
        continue;
      }
      // Numbers the tasks of all ops, one op after another.
      int64_t ends[kMaxTasksOps], all = 0;
      for (size_t j = 0; j < step.ops.size(); j++) ends[j] = all += step.ops[j]->tasks(r);
      team_.share(round, thread, all, [&](int64_t task) {
        size_t j = 0;
        while (task >= ends[j]) j++;
        step.ops[j]->task(r, j == 0 ? task : task - ends[j - 1]);
      });
    }
  };
  pool_.run(walk, [&](int thread) { return team_.takes_part(thread); });
  return !stop;
}

}  // namespace deskside
