// Ops that treat each row on its own: embedding, norms, rope, gates, routing, rounding to 8 bits.
#include <cmath>
#include <cstring>

#include "dequantize.h"
#include "ops.h"

namespace deskside {

void Embed::row(const Run& r, int64_t i) const {
  dequantize_row(type, table + r.batch.tokens[size_t(i)] * row_bytes, cols, r.row(out, i));
}

void Norm::row(const Run& r, int64_t i) const {
  const float *x = r.row(in, i), *z = gated ? r.row(gate, i) : nullptr;
  float* y = r.row(out, i);
  for (int c = 0; c < in.width; c += group) {
    if (gated)
      r.kernels.gated_norm(x + c, z + c, weight, group, eps, y + c);
    else
      r.kernels.rms_norm(x + c, weight, group, eps, y + c);
  }
}

void Quantize::row(const Run& r, int64_t i) const {
  r.kernels.quantize(r.row(in, i), 0, in.width, r.record(out, i, in.width), in.width);
}

void SplitGate::row(const Run& r, int64_t i) const {
  const size_t bytes = size_t(head_dim) * 4;
  const float* x = r.row(in, i);
  for (int64_t h = 0; h < heads; h++) {
    std::memcpy(r.row(out, i) + h * head_dim, x + 2 * h * head_dim, bytes);
    std::memcpy(r.row(gate, i) + h * head_dim, x + (2 * h + 1) * head_dim, bytes);
  }
}

void Rope::row(const Run& r, int64_t i) const {
  const Segment& seg = r.segment_of(i);
  const int half = n_rot / 2;
  const float* x = r.row(in, i);
  float* y = r.row(out, i);
  std::memcpy(y, x, size_t(in.width) * 4);
  for (int p = 0; p < half; p++) {
    const double angle = double(seg.pos + i - seg.row) * inv_freq[size_t(p)];
    const float c = float(std::cos(angle)), sn = float(std::sin(angle));
    const int a = neox ? p : 2 * p, b = neox ? p + half : 2 * p + 1;
    for (int64_t h = 0; h < heads; h++) {
      const float u = x[h * head_dim + a], v = x[h * head_dim + b];
      y[h * head_dim + a] = u * c - v * sn;
      y[h * head_dim + b] = u * sn + v * c;
    }
  }
}

void StoreKV::row(const Run& r, int64_t i) const {
  const State& s = r.state(state);
  const Segment& seg = r.segment_of(i);
  const int64_t pos = seg.pos + i - seg.row;
  for (int h = 0; h < kv_heads; h++) {
    r.kernels.store_kv(r.row(k, i) + int64_t(h) * head_dim, head_dim, s.k_type,
                       s.k + seg.slot * s.k_slot + h * s.k_head + pos * s.k_row);
    r.kernels.store_kv(r.row(v, i) + int64_t(h) * head_dim, head_dim, s.v_type,
                       s.v + seg.slot * s.v_slot + h * s.v_head + pos * s.v_row);
  }
}

void DeltaGates::row(const Run& r, int64_t i) const {
  float* x = r.row(qkv, i);
  const float q_scale = 1.0f / std::sqrt(float(head_dim));
  for (int h = 0; h < 2 * k_heads; h++)
    r.kernels.unit_norm(x + int64_t(h) * head_dim, head_dim, eps, h < k_heads ? q_scale : 1.0f);
  r.kernels.delta_gates(r.row(a, i), r.row(b, i), ssm_a, dt_bias, v_heads);
}

void Binary::row(const Run& r, int64_t i) const {
  const float *a = r.row(x, i), *b = r.row(y, i);
  float* to = r.row(out, i);
  switch (kind) {
    case kSwiglu: r.kernels.swiglu(a, b, out.width, to); break;
    case kSigmoidGate:
      r.kernels.sigmoid_gate(a, b, out.width, y.width == 1 && out.width != 1, to);
      break;
    case kAdd: r.kernels.add(a, b, out.width, to); break;
  }
}

void Route::row(const Run& r, int64_t i) const {
  r.kernels.route(r.row(logits, i), logits.width, top_k, r.row(ids, i), r.row(weights, i));
}

void TakeRows::row(const Run& r, int64_t i) const {
  std::memcpy(r.row(out, i), r.row(in, r.batch.outputs[size_t(i)]), size_t(in.width) * 4);
}

}  // namespace deskside
