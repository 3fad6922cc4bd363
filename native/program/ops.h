// The ops of a program. lowering/steps.py makes them from a tape; backends/reference.py defines
// what they compute.
#pragma once

#include <vector>

#include "program.h"

namespace deskside {

// ---- rows ---------------------------------------------------------------------------------------

struct Embed {
  const uint8_t* table;  // the file's rows
  Type type;
  int64_t cols, row_bytes;
  Buffer out;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return 2 * cols; }
};

// rms_norm, or gated_norm if `gated`, over groups of `group` values.
struct Norm {
  Buffer in, gate, out;
  bool gated;
  const float* weight;
  int group;
  float eps;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return int64_t(in.width) * (gated ? 8 : 2); }
};

// Rounds rows to 8 bits, as records (kernels.h).
struct Quantize {
  Buffer in, out;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return 2 * int64_t(in.width); }
};

struct SplitGate {
  Buffer in, out, gate;
  int heads, head_dim;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return in.width; }
};

struct Rope {
  Buffer in, out;
  int heads, head_dim, n_rot;
  bool neox;
  std::vector<double> inv_freq;  // n_rot / 2
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return in.width + 100 * int64_t(n_rot); }
};

// Writes a token's keys and values to the cache.
struct StoreKV {
  Buffer k, v;
  int kv_heads, head_dim, state;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return 4 * int64_t(k.width); }
};

// Per token, in place: scales q and k to length 1, then q by 1 / sqrt(head_dim). a becomes the
// decay, b becomes beta.
struct DeltaGates {
  Buffer qkv, a, b;
  const float *ssm_a, *dt_bias;
  int k_heads, v_heads, head_dim;
  float eps;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return 4 * int64_t(k_heads) * head_dim + 40 * int64_t(v_heads); }
};

// swiglu, sigmoid_gate and add: two inputs, element by element.
struct Binary {
  enum Kind { kSwiglu, kSigmoidGate, kAdd } kind;
  Buffer x, y, out;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return int64_t(x.width) * (kind == kAdd ? 1 : 8); }
};

struct Route {
  Buffer logits, ids, weights;
  int top_k;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return 4 * int64_t(logits.width); }
};

struct TakeRows {
  Buffer in, out;
  void row(const Run& r, int64_t i) const;
  int64_t row_work() const { return in.width; }
};

// ---- tasks --------------------------------------------------------------------------------------

// The rows of activations that matrices read: floats, and records for quantised weights.
struct Input {
  Buffer f, q;
  // The first n rows, or the n rows that `index` names.
  Rows rows(const Run& r, int n, const int32_t* index = nullptr) const {
    return {r.at(f), r.record(q, 0, f.width), f.width, f.stride, n, index};
  }
};

// silu(gate x) * (up x), some panels at a time. gate and up have the same shape.
struct GatedPair {
  Weights gate, up;

  // Calls done(i, values) for each row i of x, with 16 values per panel. The thread's work memory
  // holds kTokens rows of both products.
  template <class F>
  void run(const Run& r, const PanelRange& panels, const Rows& x, F&& done) const;
  static constexpr int kTokens = 256;
  static constexpr int kPanels = 8;  // limit on the panels of a call
  static constexpr int64_t kWork = int64_t(2) * kTokens * kPanels * kPanelRows;
};

// Matrices that multiply the same rows.
struct Linear {
  struct Part {
    Weights w;
    Buffer out;
    bool to_logits = false;  // write to the batch's logits instead of `out`
    // swiglu: `w` is the gate, out = silu(w x) * (up x).
    bool has_up = false;
    Weights up{};
    // conv_silu: `out` is the convolution's result.
    int kernel = 0;
    std::vector<float> taps{};  // (kernel, rows)
    int state = 0;
  };
  Input in;
  bool per_output;
  std::vector<Part> parts;
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;
  int64_t work_floats(int64_t max_tokens) const;
  int64_t max_cols() const { return in.f.width; }

 private:
  static constexpr int kFew = 16;    // up to so many rows, a task takes many panels
  static constexpr int kPanels = 2;  // panels of a task with more rows
  int rows_of(const Run& r) const;
  int64_t chunk(const Part& p, const Run& r) const;
  void run_part(const Part& p, const Run& r, int64_t p0, int64_t p1) const;
};

struct Attention {
  Buffer q, out;
  int heads, kv_heads, head_dim;
  float scale;
  int state;
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;
  int64_t work_floats(int64_t max_tokens) const;
  int64_t shared_bytes(int64_t max_tokens) const;
};

// Merges the splits of Attention. It has no tasks if there was one split.
struct MergeAttention {
  Buffer out;
  int heads, head_dim;
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;
};

struct GatedDelta {
  Buffer qkv, decay, beta, out;
  int k_heads, v_heads, head_dim, state;
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;

 private:
  int slices(const Run& r) const;
};

// The tokens of each expert. A pair is one (token, selected expert); its number is token * top_k +
// i for the token's i-th expert. Pairs are sorted by expert. Those with the id -1 are left out.
struct Routing {
  int32_t* n_active;
  int32_t* active;  // experts with at least one token
  int32_t* first;   // per active expert: its first sorted pair; one more entry: the end
  int32_t* pair;    // sorted pair -> its number
  int32_t* token;   // sorted pair -> its token
  int32_t* count;   // work space
  int64_t bytes;

  Routing(uint8_t* base, int n_expert, int64_t pairs);
};

struct ExpertShape {
  int n_expert, top_k, width;
  int64_t up_panels() const { return panels_of(width); }  // of one expert's gate, or up
  Routing routing(const Run& r) const {
    return Routing(r.shared(), n_expert, int64_t(r.n_tokens()) * top_k);
  }
  int64_t shared_bytes(int64_t max_tokens) const {
    return Routing(nullptr, n_expert, max_tokens * top_k).bytes;
  }
};

struct SortExperts {
  ExpertShape shape;
  Buffer ids;
  void row(const Run& r, int64_t i) const;
  int64_t shared_bytes(int64_t n) const { return shape.shared_bytes(n); }
};

// For each sorted pair: silu(gate x) * (up x) with its expert's matrices.
struct ExpertsUp {
  ExpertShape shape;
  Input in, out;      // out has top_k rows per token, as floats or as records
  GatedPair weights;  // of all experts, one after another; each starts on a panel
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;
  int64_t work_floats(int64_t) const { return GatedPair::kWork; }
  int64_t max_cols() const { return in.f.width; }
};

// The sum over a token's experts of weight * (down h).
struct ExpertsDown {
  ExpertShape shape;
  Input in;
  Buffer weights, out;
  Weights down;
  int64_t tasks(const Run& r) const;
  void task(const Run& r, int64_t i) const;
  int64_t work_floats(int64_t max_tokens) const;
  int64_t max_cols() const { return shape.width; }

 private:
  static constexpr int kTokens = 256;         // limit on an expert's tokens in one product
  static constexpr int kMaxPanels = 32;       // limit on the panels of a task
  static constexpr int64_t kSums = 32 << 10;  // floats of a task's sums
  int64_t chunk(const Run& r) const;
};

}  // namespace deskside
