// A tape made ready for this machine: a list of ops with their weights and buffer places, run by all
// threads together, one barrier after each phase.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace deskside {

// A planned activation buffer: (max_tokens, width) floats from `offset` floats into the arena.
struct Buffer {
  int64_t offset;
  int width;
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
  std::vector<int32_t> outputs;  // rows whose logits are wanted
  float* logits;                 // (outputs, n_vocab)
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

// What an op sees while it runs: everything is shared but the thread's own id and tile.
struct Run {
  const Kernels& kernels;
  Program& program;
  Team& team;
  const Batch& batch;
  int thread;

  int n_tokens() const { return int(batch.tokens.size()); }
  float* at(Buffer b) const;
  uint8_t* scratch() const;
  const Tile& tile() const;
  const State& state(int index) const;
};

struct Op {
  virtual ~Op() = default;
  virtual void run(const Run& r) const = 0;
  // Bytes of shared scratch for max_tokens tokens.
  virtual int64_t scratch_bytes(int64_t /*max_tokens*/, int /*threads*/) const { return 0; }
  // Longest weight row that the op decodes.
  virtual int64_t max_cols() const { return 0; }
};

class Program {
 public:
  Program(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa);

  void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }
  // Call once after the last op: takes the scratch memory that the ops need.
  void finish();
  void set_states(std::vector<State> states) { states_ = std::move(states); }

  // Runs all ops; `micros`, if not null, receives each op's wall time. `interrupted` is asked now
  // and then between ops; true ends the run early, with whatever the states then hold, and makes
  // this return false.
  bool run(const Batch& batch, std::vector<double>* micros,
           const std::function<bool()>& interrupted);

  const char* isa() const { return kernels_.name; }
  int n_threads() const { return pool_.size(); }
  int max_tokens() const { return max_tokens_; }
  size_t n_ops() const { return ops_.size(); }
  size_t n_states() const { return states_.size(); }
  int64_t nbytes() const { return int64_t(arena_.size() * 4 + scratch_.size() + tiles_.size()); }

 private:
  friend struct Run;
  const Kernels& kernels_;
  const int max_tokens_;
  Pool pool_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<State> states_;
  std::vector<float> arena_;
  std::vector<uint8_t> scratch_, tiles_;
  std::vector<Tile> tile_;
};

inline float* Run::at(Buffer b) const { return program.arena_.data() + b.offset; }
inline uint8_t* Run::scratch() const { return program.scratch_.data(); }
inline const Tile& Run::tile() const { return program.tile_[size_t(thread)]; }
inline const State& Run::state(int index) const { return program.states_[size_t(index)]; }

}  // namespace deskside
