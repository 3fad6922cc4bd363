// The ops of the tape (tape.py) as the CPU runs them. Meaning: backends/reference.py.
#pragma once

#include <array>
#include <vector>

#include "program.h"

namespace deskside {

struct Embed : Op {
  Matrix table;
  Buffer out;
  void run(const Run& r) const override;
  int64_t max_cols() const override { return table.cols; }
};

// rms_norm, or gated_norm where `gate` is set; groups of `group` values.
struct Norm : Op {
  Buffer in, gate, out;
  bool gated;
  const float* weight;
  int group;
  float eps;
  bool per_output;
  void run(const Run& r) const override;
};

// One or more matrices applied to the same rows: they share the activations' rounding to 8 bits.
struct Linear : Op {
  struct Part {
    Matrix w;
    Buffer out;
    bool to_logits;  // write to the batch's logits instead of `out`
  };
  Buffer in;
  bool per_output;
  std::vector<Part> parts;
  void run(const Run& r) const override;
  int64_t scratch_bytes(int64_t max_tokens, int threads) const override;
  int64_t max_cols() const override { return in.width; }
};

struct SplitGate : Op {
  Buffer in, out, gate;
  int heads, head_dim;
  void run(const Run& r) const override;
};

struct Rope : Op {
  Buffer in, out;
  int heads, head_dim, n_rot;
  bool neox;
  std::vector<double> inv_freq;  // n_rot / 2
  void run(const Run& r) const override;
};

struct Attention : Op {
  Buffer q, k, v, out;
  int heads, kv_heads, head_dim;
  float scale;
  int state;
  void run(const Run& r) const override;
  int64_t scratch_bytes(int64_t max_tokens, int threads) const override;
};

struct ConvSilu : Op {
  Buffer in, out;
  int kernel;
  std::vector<float> weight;  // (kernel, width)
  int state;
  void run(const Run& r) const override;
};

struct GatedDelta : Op {
  Buffer qkv, a, b, out;
  const float *ssm_a, *dt_bias;
  int k_heads, v_heads, head_dim;
  float eps;
  int state;
  void run(const Run& r) const override;
};

// swiglu, sigmoid_gate and add: two inputs, element by element.
struct Binary : Op {
  enum Kind { kSwiglu, kSigmoidGate, kAdd } kind;
  Buffer x, y, out;
  void run(const Run& r) const override;
};

struct Route : Op {
  Buffer logits, ids, weights;
  int top_k;
  void run(const Run& r) const override;
};

struct Experts : Op {
  Buffer in, ids, weights, out;
  int n_expert, top_k, width;
  Matrix gate, up, down;  // of all experts: rows of expert e start at e * rows per expert
  void run(const Run& r) const override;
  int64_t scratch_bytes(int64_t max_tokens, int threads) const override;
  int64_t max_cols() const override { return in.width > width ? in.width : width; }

 private:
  struct Scratch;
  Scratch layout(uint8_t* base, int64_t max_tokens, int threads) const;
};

struct TakeRows : Op {
  Buffer in, out;
  void run(const Run& r) const override;
};

}  // namespace deskside
