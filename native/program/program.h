// A native program: a list of steps, with their weights and buffers, that all threads run together.
//
// In a step of *rows*, the ops treat every row on its own. They run on a row one after another. In
// a step of *tasks*, the ops are independent, and the threads share their tasks. There is a barrier
// between steps. One thread runs small steps of rows inside the barrier, so at decode only steps of
// tasks have one.
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

// A buffer of activations: max_tokens rows of `width` floats, `stride` floats apart. It starts
// `offset` floats into the arena.
struct Buffer {
  int64_t offset;
  int width, stride;
};

// `n` tokens of the sequence in `slot`, the first at position `pos`. In the batch, `row` is their
// first row.
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

// A state's arrays (tape/cache.py): k and v, or one array in `k`. Strides are in bytes.
struct State {
  uint8_t *k, *v;
  int64_t k_slot, v_slot;  // between sequences
  int64_t k_head, v_head;  // between KV heads
  int64_t k_row, v_row;    // between positions
  Type k_type, v_type;
};

class Program;

// What an op sees while it runs. All of it is shared, except the thread's id, tile and work memory.
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
  // Record i (kernels.h) of rows of `cols` values. Records follow each other.
  uint8_t* record(Buffer b, int64_t i, int64_t cols) const {
    return reinterpret_cast<uint8_t*>(at(b)) + i * record_bytes(cols);
  }
  float* work() const;      // this thread's work memory, of the op's work_floats
  uint8_t* shared() const;  // the memory that all threads share, of the op's shared_bytes
  const Tile& tile() const;
  const State& state(int index) const;
};

// An op of a program. Rows ops override row(), tasks ops override tasks() and task().
struct Op {
  virtual ~Op() = default;
  // Rows ops: computes one row; about how many floats a row reads and writes.
  virtual void row(const Run&, int64_t) const {}
  virtual int64_t row_work() const { return 0; }
  // Tasks ops.
  virtual int64_t tasks(const Run&) const { return 0; }
  virtual void task(const Run&, int64_t) const {}

  virtual int64_t work_floats(int64_t /*max_tokens*/) const { return 0; }
  virtual int64_t shared_bytes(int64_t /*max_tokens*/) const { return 0; }
  // The longest row of weights that the op multiplies.
  virtual int64_t max_cols() const { return 0; }
};

// Wraps an op of ops.h. Those are structs without a base, so that their fields can be initialised
// by name. Functions that they do not define are `Op`'s.
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

// The work memory of a program. Ops use it in turn, so each size is the largest that an op needs.
struct WorkMemory {
  int64_t shared = 0;  // bytes that all threads share
  int64_t floats = 0;  // of each thread
  int64_t cols = 32;   // of the longest row of weights: a thread's tile has unpacked panels of it

  void add(const Op& op, int64_t max_tokens);
  // Takes one thread's floats and its tile.
  float* take(Carver& carver, Tile& tile) const;
  int64_t bytes(int n_threads) const;
};

constexpr size_t kMaxTasksOps = 16;  // limit on the ops of a step of tasks

struct Step {
  // A row is a token (kRows) or a wanted logit row (kOutputs); kOnce has one row in all.
  enum Kind { kRows, kOutputs, kOnce, kTasks } kind;
  std::vector<std::unique_ptr<Op>> ops;
  int64_t row_work = 0;  // of all ops
};

class Program {
 public:
  Program(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa);

  void begin(Step::Kind kind) { steps_.push_back({kind, {}, 0}); }
  void add(std::unique_ptr<Op> op) { steps_.back().ops.push_back(std::move(op)); }
  // Allocates the work memory that the ops need. Call it once, after the last op.
  void finish();
  void set_states(std::vector<State> states) { states_ = std::move(states); }

  // Runs the steps [begin, end) on `threads` of the pool. `micros`, if not null, receives the wall
  // time of each step. `interrupted` is called now and then between steps. If it returns true, the
  // run ends early and returns false, and the states are partly updated.
  bool run(const Batch& batch, int threads, size_t begin, size_t end, std::vector<double>* micros,
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
