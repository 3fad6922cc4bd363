// Ops that carry state along the sequence: convolution, gated delta net, attention.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "scratch.h"

namespace deskside {

namespace {
// Splits a task number into a segment and the rest, when every segment has `tasks(segment)` tasks.
template <class F> const Segment& find_segment(const Batch& batch, int64_t& task, F&& tasks) {
  const Segment* seg = batch.segments.data();
  for (int64_t own; task >= (own = tasks(*seg)); seg++) task -= own;
  return *seg;
}
}  // namespace

void ConvSilu::run(const Run& r) const {
  constexpr int kChannels = 256;
  const State& s = r.state(state);
  const int chunks = (in.width + kChannels - 1) / kChannels;
  r.team.for_each(chunks * int64_t(r.batch.segments.size()), [&](int64_t task) {
    const Segment& seg = r.batch.segments[size_t(task / chunks)];
    const int c0 = int(task % chunks) * kChannels, c1 = std::min(c0 + kChannels, in.width);
    const int64_t row = int64_t(seg.row) * in.width;
    r.kernels.conv_silu(r.at(in) + row, seg.n, in.width, c0, c1, kernel, weight.data(),
                        reinterpret_cast<float*>(s.k + seg.slot * s.k_slot), r.at(out) + row);
  });
}

void GatedDelta::run(const Run& r) const {
  // First per token, in place: unit q (divided by sqrt(head_dim)) and k, decay in a, beta in b.
  r.team.for_each(r.n_tokens(), [&](int64_t t) {
    float* x = r.at(qkv) + t * qkv.width;
    const float q_scale = 1.0f / std::sqrt(float(head_dim));
    for (int h = 0; h < 2 * k_heads; h++)
      r.kernels.unit_norm(x + int64_t(h) * head_dim, head_dim, eps, h < k_heads ? q_scale : 1.0f);
    float *ga = r.at(a) + t * v_heads, *gb = r.at(b) + t * v_heads;
    for (int h = 0; h < v_heads; h++) {
      const float u = ga[h] + dt_bias[h];
      const float softplus = u > 20 ? u : std::log1p(std::exp(u));
      ga[h] = std::exp(ssm_a[h] * softplus);
      gb[h] = 1.0f / (1.0f + std::exp(-gb[h]));
    }
  });
  r.team.barrier();

  // Then each (sequence, head, slice of value columns) runs through its tokens.
  constexpr int kColumns = 32;
  const State& s = r.state(state);
  const int slices = head_dim % kColumns ? 1 : head_dim / kColumns;
  const int columns = head_dim / slices;
  const int64_t per_segment = int64_t(v_heads) * slices;
  r.team.for_each(per_segment * int64_t(r.batch.segments.size()), [&](int64_t task) {
    const Segment& seg = r.batch.segments[size_t(task / per_segment)];
    const int head = int(task % per_segment) / slices, slice = int(task % slices);
    const float* x = r.at(qkv) + int64_t(seg.row) * qkv.width;
    DeltaSlice d;
    d.state = reinterpret_cast<float*>(s.k + seg.slot * s.k_slot) +
              int64_t(head) * head_dim * head_dim;
    d.dim = head_dim;
    d.c0 = slice * columns;
    d.c1 = d.c0 + columns;
    d.n = seg.n;
    d.q = x + int64_t(head % k_heads) * head_dim;
    d.k = d.q + int64_t(k_heads) * head_dim;
    d.v = x + int64_t(2 * k_heads + head) * head_dim;
    d.stride = qkv.width;
    d.decay = r.at(a) + int64_t(seg.row) * v_heads + head;
    d.beta = r.at(b) + int64_t(seg.row) * v_heads + head;
    d.gate_stride = v_heads;
    d.out = r.at(out) + int64_t(seg.row) * out.width + int64_t(head) * head_dim;
    d.out_stride = out.width;
    r.kernels.gated_delta(d);
  });
}

// ---- attention ----------------------------------------------------------------------------------
//
// A tile is up to kQueryRows rows (token, query head) of one KV head. With at most kSplitTokens
// tokens in the batch the positions are split as well, so that one long sequence keeps every thread
// busy; the parts are merged by their maxima and sums. How the work is cut depends on the batch
// alone, never on the number of threads: results do not change with it.

namespace {
constexpr int kSplitTokens = 8, kMaxSplits = 64;
constexpr int64_t kSplitLength = 512;

struct Splits {
  int n;
  int64_t length;
};

Splits split(int64_t positions) {
  const int64_t even = (positions + kMaxSplits - 1) / kMaxSplits;
  const int64_t length = (std::max(kSplitLength, even) + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  return {int((positions + length - 1) / length), length};
}

struct AttentionScratch {
  float* local;     // per thread: work, acc, max, sum
  float* parts;     // per (token, head, split): head_dim + 2 floats
  int64_t per_thread;
};

AttentionScratch attention_layout(Carver& c, int threads, int heads, int head_dim) {
  const int64_t per_thread = attention_work(head_dim) + int64_t(kQueryRows) * (head_dim + 2);
  AttentionScratch s;
  s.per_thread = (per_thread + 15) / 16 * 16;
  s.local = c.take<float>(s.per_thread * threads);
  s.parts = c.take<float>(int64_t(kSplitTokens) * heads * kMaxSplits * (head_dim + 2));
  return s;
}
}  // namespace

int64_t Attention::scratch_bytes(int64_t, int threads) const {
  Carver c(nullptr);
  attention_layout(c, threads, heads, head_dim);
  return c.used();
}

void Attention::run(const Run& r) const {
  const State& s = r.state(state);
  r.team.for_each(r.n_tokens(), [&](int64_t row) {
    int64_t i = row;
    const Segment& seg = find_segment(r.batch, i, [](const Segment& g) { return g.n; });
    for (int h = 0; h < kv_heads; h++) {
      r.kernels.store_kv(r.at(k) + row * k.width + int64_t(h) * head_dim, head_dim, s.k_type,
                         s.k + seg.slot * s.k_slot + h * s.k_head + (seg.pos + i) * s.k_row);
      r.kernels.store_kv(r.at(v) + row * v.width + int64_t(h) * head_dim, head_dim, s.v_type,
                         s.v + seg.slot * s.v_slot + h * s.v_head + (seg.pos + i) * s.v_row);
    }
  });
  r.team.barrier();

  const int group = heads / kv_heads;                       // query heads of a KV head
  const int tokens_per_tile = std::max(1, kQueryRows / group);
  const int head_tiles = (group + kQueryRows - 1) / kQueryRows;  // > 1 only for huge groups
  const bool splitting = r.n_tokens() <= kSplitTokens;
  Carver carver(r.scratch());
  const AttentionScratch scratch = attention_layout(carver, r.team.size(), heads, head_dim);
  const int64_t part = head_dim + 2;

  const auto token_tiles = [&](const Segment& g) {
    return (g.n + tokens_per_tile - 1) / tokens_per_tile;
  };
  const auto splits_of = [&](const Segment& g) {
    return splitting ? split(g.pos + g.n) : Splits{1, g.pos + g.n};
  };
  const auto tasks_of = [&](const Segment& g) {
    return int64_t(token_tiles(g)) * head_tiles * kv_heads * splits_of(g).n;
  };
  int64_t tasks = 0;
  for (const Segment& g : r.batch.segments) tasks += tasks_of(g);

  r.team.for_each(tasks, [&](int64_t task) {
    const Segment& seg = find_segment(r.batch, task, tasks_of);
    const Splits splits = splits_of(seg);
    const int sp = int(task % splits.n);
    task /= splits.n;
    const int kv = int(task % kv_heads);
    task /= kv_heads;
    const int head_tile = int(task % head_tiles);
    const int t0 = int(task / head_tiles) * tokens_per_tile;
    const int n = std::min(tokens_per_tile, seg.n - t0);
    const int h0 = head_tile * kQueryRows;
    const int own_heads = std::min(group - h0, kQueryRows);

    float* local = scratch.local + r.thread * scratch.per_thread;
    const float* rows[kQueryRows];
    const int n_rows = n * own_heads;
    for (int i = 0; i < n_rows; i++)
      rows[i] = r.at(q) + int64_t(seg.row + t0 + i / own_heads) * q.width +
                int64_t(kv * group + h0 + i % own_heads) * head_dim;
    AttentionTile t;
    t.q = rows;
    t.n_rows = n_rows;
    t.group = own_heads;
    t.head_dim = head_dim;
    t.pos0 = seg.pos + t0;
    t.begin = sp * splits.length;
    t.end = std::min(t.begin + splits.length, t.pos0 + n);
    t.scale = scale;
    t.k = s.k + seg.slot * s.k_slot + kv * s.k_head;
    t.v = s.v + seg.slot * s.v_slot + kv * s.v_head;
    t.k_type = s.k_type;
    t.v_type = s.v_type;
    t.k_row = s.k_row;
    t.v_row = s.v_row;
    t.work = local;
    t.acc = local + attention_work(head_dim);
    t.max = t.acc + int64_t(kQueryRows) * head_dim;
    t.sum = t.max + kQueryRows;
    r.kernels.attention(t);

    for (int i = 0; i < n_rows; i++) {
      const int64_t token = seg.row + t0 + i / own_heads, head = kv * group + h0 + i % own_heads;
      const float* acc = t.acc + int64_t(i) * head_dim;
      float* to = splitting ? scratch.parts + ((token * heads + head) * kMaxSplits + sp) * part
                            : r.at(out) + token * out.width + head * head_dim;
      const float norm = splitting ? 1.0f : 1.0f / t.sum[i];
      for (int c = 0; c < head_dim; c++) to[c] = acc[c] * norm;
      if (splitting) to[head_dim] = t.max[i], to[head_dim + 1] = t.sum[i];
    }
  });
  if (!splitting) return;
  r.team.barrier();

  r.team.for_each(int64_t(r.n_tokens()) * heads, [&](int64_t task) {
    int64_t token = task / heads;
    const Segment& seg = find_segment(r.batch, token, [](const Segment& g) { return g.n; });
    const float* parts = scratch.parts + task * kMaxSplits * part;
    float* y = r.at(out) + task / heads * out.width + task % heads * head_dim;
    const int n = splits_of(seg).n;
    float top = -INFINITY, total = 0;
    for (int i = 0; i < n; i++) top = std::max(top, parts[i * part + head_dim]);
    std::fill(y, y + head_dim, 0.0f);
    for (int i = 0; i < n; i++) {
      const float* p = parts + i * part;
      const float w = std::exp(p[head_dim] - top);
      total += w * p[head_dim + 1];
      r.kernels.axpy(w, p, head_dim, y);
    }
    for (int c = 0; c < head_dim; c++) y[c] /= total;
  });
}

}  // namespace deskside
