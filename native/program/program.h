// A tape made ready for this machine: a list of steps with their weights and buffer places, walked
// by all threads together.
//
// A step is either *rows* (its ops treat every row on its own: they run one after another on a row)
// or *tasks* (its ops do not depend on each other and share out their tasks together). A barrier
// stands between steps; rows steps that are too small to share are run inside it by one thread, so
// at decode only tasks steps have one.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "scratch.h"
#include "thread_pool.h"

namespace deskside {

// A planned activation buffer: max_tokens rows of `width` floats, `stride` floats apart, from
// `offset` floats into the arena.
struct Buffer {
  int64_t offset;
  int width, stride;
};

// `n` tokens of the sequence in `slot`, the first at position `pos`; they are rows `row`.. of the
// batch.
struct Segment {
  int slot;
  int64_t pos;
  int n;
  int row;
};

struct Batch {
  std::vector<int32_t> tokens;
  std::vector<Segment> segments;
  std::vector<int32_t> outputs;     // rows whose logits are wanted
  std::vector<int32_t> segment_of;  // of each row
  float* logits;                    // (outputs, n_vocab)
};

// A state's arrays (cache.py): k and v, or one array in `k`. Strides in bytes.
struct State {
  uint8_t *k, *v;
  int64_t k_slot, v_slot;  // from a sequence to the next
  int64_t k_head, v_head;  // from a KV head to the next
  int64_t k_row, v_row;    // from a position to the next
  Type k_type, v_type;
};

class Program;

// What an op sees while it runs: everything is shared but the thread's own id, tile and work
// memory.
struct Run {
  const Kernels& kernels;
  Program& program;
  const Batch& batch;
  int thread, n_threads;

  int n_tokens() const { return int(batch.tokens.size()); }
  const Segment& segment_of(int64_t row) const {
    return batch.segments[size_t(batch.segment_of[size_t(row)])];
  }
  float* at(Buffer b) const;
  float* row(Buffer b, int64_t i) const { return at(b) + i * b.stride; }
  // Record i (kernels.h) of rows of `cols` values: records follow each other.
  uint8_t* record(Buffer b, int64_t i, int64_t cols) const {
    return reinterpret_cast<uint8_t*>(at(b)) + i * record_bytes(cols);
  }
  float* work() const;      // this thread's, as much as its op asked for
  uint8_t* shared() const;  // one for all threads, as much as its op asked for
  const Tile& tile() const;
  const State& state(int index) const;
};

// An op of a program. One that treats each row on its own overrides row(), the others tasks() and
// task().
struct Op {
  virtual ~Op() = default;
  // Rows ops: one row; about how many floats it touches.
  virtual void row(const Run&, int64_t) const {}
  virtual int64_t row_work() const { return 0; }
  // Tasks ops.
  virtual int64_t tasks(const Run&) const { return 0; }
  virtual void task(const Run&, int64_t) const {}

  virtual int64_t work_floats(int64_t /*max_tokens*/) const { return 0; }
  virtual int64_t shared_bytes(int64_t /*max_tokens*/) const { return 0; }
  // Longest weight row that the op multiplies.
  virtual int64_t max_cols() const { return 0; }
};

// Holds an op of ops.h. Those are plain structs without a base, so that whoever makes one can name
// its fields; what they do not define is as `Op` has it.
template <class T> struct OpOf final : Op {
  T op;
  static constexpr bool kHasRow = requires(const T& t, const Run& r) { t.row(r, 0); };
  static constexpr bool kHasTasks = requires(const T& t, const Run& r) { t.task(r, t.tasks(r)); };
  static_assert(kHasRow != kHasTasks);

  explicit OpOf(T o) : op(std::move(o)) {}
  void row(const Run& r, int64_t i) const override {
    if constexpr (kHasRow) op.row(r, i);
  }
  int64_t row_work() const override {
    if constexpr (requires { op.row_work(); }) return op.row_work();
    return Op::row_work();
  }
  int64_t tasks(const Run& r) const override {
    if constexpr (kHasTasks) return op.tasks(r);
    return Op::tasks(r);
  }
  void task(const Run& r, int64_t i) const override {
    if constexpr (kHasTasks) op.task(r, i);
  }
  int64_t work_floats(int64_t max_tokens) const override {
    if constexpr (requires { op.work_floats(max_tokens); }) return op.work_floats(max_tokens);
    return Op::work_floats(max_tokens);
  }
  int64_t shared_bytes(int64_t max_tokens) const override {
    if constexpr (requires { op.shared_bytes(max_tokens); }) return op.shared_bytes(max_tokens);
    return Op::shared_bytes(max_tokens);
  }
  int64_t max_cols() const override {
    if constexpr (requires { op.max_cols(); }) return op.max_cols();
    return Op::max_cols();
  }
};

// The work memory of a program. One op at a time has it, so it fits the largest need of each sort.
struct WorkMemory {
  int64_t shared = 0;  // bytes that all threads share
  int64_t floats = 0;  // of each thread
  int64_t cols = 32;   // of the longest row of weights: a thread's tile holds unpacked panels of it

  void add(const Op& op, int64_t max_tokens);
  // Takes one thread's floats and its tile.
  float* take(Carver& carver, Tile& tile) const;
  int64_t bytes(int n_threads) const;
};

constexpr size_t kMaxTasksOps = 16;  // of a step of tasks

struct Step {
  // Rows are tokens (kRows), wanted logits (kOutputs), or there is one for all (kOnce).
  enum Kind { kRows, kOutputs, kOnce, kTasks } kind;
  std::vector<std::unique_ptr<Op>> ops;
  int64_t row_work = 0;  // of all ops
};

class Program {
 public:
  Program(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa);

  void begin(Step::Kind kind) { steps_.push_back({kind, {}, 0}); }
  void add(std::unique_ptr<Op> op) { steps_.back().ops.push_back(std::move(op)); }
  // Call once after the last op: takes the work memory that the ops need.
  void finish();
  void set_states(std::vector<State> states) { states_ = std::move(states); }

  // Runs the steps [begin, end); `micros`, if not null, receives each one's wall time.
  // `interrupted` is asked now and then between steps; true ends the run early, with whatever the
  // states then hold, and makes this return false.
  bool run(const Batch& batch, size_t begin, size_t end, std::vector<double>* micros,
           const std::function<bool()>& interrupted);

  const char* isa() const { return kernels_.name; }
  int n_threads() const { return pool_.size(); }
  int max_tokens() const { return max_tokens_; }
  size_t n_steps() const { return steps_.size(); }
  size_t n_states() const { return states_.size(); }
  float* activations() { return reinterpret_cast<float*>(arena_.data()); }
  int64_t nbytes() const { return arena_.bytes() + (memory_ ? memory_->bytes() : 0); }

 private:
  friend struct Run;
  int64_t rows(const Step& step, const Batch& batch) const;
  bool serial(const Step& step, const Batch& batch) const;
  void run_rows(const Step& step, const Run& r, int64_t row) const;

  const Kernels& kernels_;
  const int max_tokens_;
  Pool pool_;
  Team team_;
  uint32_t round_ = 0;
  std::vector<Step> steps_;
  std::vector<State> states_;
  Arena arena_;                    // activations
  std::unique_ptr<Arena> memory_;  // shared memory of the ops, then each thread's
  std::vector<float*> work_;
  std::vector<Tile> tile_;
};

inline float* Run::at(Buffer b) const {
  return reinterpret_cast<float*>(program.arena_.data()) + b.offset;
}
inline uint8_t* Run::shared() const { return program.memory_->data(); }
inline float* Run::work() const { return program.work_[size_t(thread)]; }
inline const Tile& Run::tile() const { return program.tile_[size_t(thread)]; }
inline const State& Run::state(int index) const { return program.states_[size_t(index)]; }

}  // namespace deskside
