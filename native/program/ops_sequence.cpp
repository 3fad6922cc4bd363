// Ops that carry state along the sequence: gated delta net, attention.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace deskside {

namespace {
// Finds the segment of a task, if every segment has `tasks(segment)` tasks. `task` becomes its
// number within the segment.
template <class F> const Segment& find_segment(const Batch& batch, int64_t& task, F&& tasks) {
  const Segment* seg = batch.segments.data();
  for (int64_t own; task >= (own = tasks(*seg)); seg++) task -= own;
  return *seg;
}
}  // namespace

// Value columns of a head are independent. If there are few heads per thread, they are split in
// halves.
int GatedDelta::slices(const Run& r) const {
  const int64_t heads = int64_t(v_heads) * int64_t(r.batch.segments.size());
  return heads < 4 * r.n_threads && head_dim % 128 == 0 ? 2 : 1;
}

int64_t GatedDelta::tasks(const Run& r) const {
  return int64_t(v_heads) * slices(r) * int64_t(r.batch.segments.size());
}

// A task is one (sequence, head, slice of value columns), over all tokens of the sequence.
void GatedDelta::task(const Run& r, int64_t task) const {
  const State& s = r.state(state);
  const int slices = this->slices(r), columns = head_dim / slices;
  const int64_t per_segment = int64_t(v_heads) * slices;
  const Segment& seg = r.batch.segments[size_t(task / per_segment)];
  const int head = int(task % per_segment) / slices, slice = int(task % slices);
  const float* x = r.row(qkv, seg.row);
  DeltaSlice d;
  d.state =
      reinterpret_cast<float*>(s.k + seg.slot * s.k_slot) + int64_t(head) * head_dim * head_dim;
  d.dim = head_dim;
  d.c0 = slice * columns;
  d.c1 = d.c0 + columns;
  d.n = seg.n;
  d.q = x + int64_t(head % k_heads) * head_dim;
  d.k = d.q + int64_t(k_heads) * head_dim;
  d.v = x + int64_t(2 * k_heads + head) * head_dim;
  d.stride = qkv.stride;
  d.decay = r.row(decay, seg.row) + head;
  d.beta = r.row(beta, seg.row) + head;
  d.gate_stride = decay.stride;
  d.out = r.row(out, seg.row) + int64_t(head) * head_dim;
  d.out_stride = out.stride;
  r.kernels.gated_delta(d);
}

// ---- attention ----------------------------------------------------------------------------------
//
// A tile is up to kQueryRows rows (token, query head) of one KV head. In batches of up to
// kSplitTokens tokens, the positions are split too, so that one long sequence keeps every thread
// busy. The splits are merged by their maxima and sums. The cut depends on the batch alone, so
// results do not change with the number of threads.

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

// Unnormalised results, per (token, head, split): head_dim + 2 floats.
int64_t part_floats(int head_dim) { return head_dim + 2; }

int64_t token_tiles(const Segment& g, int tokens_per_tile) {
  return (g.n + tokens_per_tile - 1) / tokens_per_tile;
}

// How the attention of a batch is cut into tasks.
struct Cut {
  bool splitting;
  int group, tokens_per_tile, head_tiles;

  Cut(const Run& r, int heads, int kv_heads)
      : splitting(r.n_tokens() <= kSplitTokens),
        group(heads / kv_heads),
        tokens_per_tile(std::max(1, kQueryRows / group)),
        head_tiles((group + kQueryRows - 1) / kQueryRows) {}  // > 1 only for huge groups
  Splits splits(const Segment& g) const {
    return splitting ? split(g.pos + g.n) : Splits{1, g.pos + g.n};
  }
  int64_t tasks(const Segment& g, int kv_heads) const {
    return token_tiles(g, tokens_per_tile) * head_tiles * kv_heads * splits(g).n;
  }
};
}  // namespace

int64_t Attention::work_floats(int64_t) const {
  return attention_work(head_dim) + int64_t(kQueryRows) * part_floats(head_dim);
}

int64_t Attention::shared_bytes(int64_t) const {
  return int64_t(kSplitTokens) * heads * kMaxSplits * part_floats(head_dim) * 4;
}

int64_t Attention::tasks(const Run& r) const {
  const Cut cut(r, heads, kv_heads);
  int64_t n = 0;
  for (const Segment& g : r.batch.segments) n += cut.tasks(g, kv_heads);
  return n;
}

void Attention::task(const Run& r, int64_t task) const {
  const State& s = r.state(state);
  const Cut cut(r, heads, kv_heads);
  const Segment& seg =
      find_segment(r.batch, task, [&](const Segment& g) { return cut.tasks(g, kv_heads); });
  const Splits splits = cut.splits(seg);
  const int sp = int(task % splits.n);
  task /= splits.n;
  const int kv = int(task % kv_heads);
  task /= kv_heads;
  const int head_tile = int(task % cut.head_tiles);
  const int t0 = int(task / cut.head_tiles) * cut.tokens_per_tile;
  const int n = std::min(cut.tokens_per_tile, seg.n - t0);
  const int h0 = head_tile * kQueryRows;
  const int own_heads = std::min(cut.group - h0, kQueryRows);

  const float* rows[kQueryRows];
  const int n_rows = n * own_heads;
  for (int i = 0; i < n_rows; i++)
    rows[i] = r.row(q, seg.row + t0 + i / own_heads) +
              int64_t(kv * cut.group + h0 + i % own_heads) * head_dim;
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
  t.work = r.work();
  t.acc = t.work + attention_work(head_dim);
  t.max = t.acc + int64_t(kQueryRows) * head_dim;
  t.sum = t.max + kQueryRows;
  r.kernels.attention(t);

  auto* parts = reinterpret_cast<float*>(r.shared());
  for (int i = 0; i < n_rows; i++) {
    const int64_t token = seg.row + t0 + i / own_heads, head = kv * cut.group + h0 + i % own_heads;
    const float* acc = t.acc + int64_t(i) * head_dim;
    if (splits.n == 1) {
      float* y = r.row(out, token) + head * head_dim;
      for (int c = 0; c < head_dim; c++) y[c] = acc[c] / t.sum[i];
      continue;
    }
    float* to = parts + ((token * heads + head) * kMaxSplits + sp) * part_floats(head_dim);
    std::copy(acc, acc + head_dim, to);
    to[head_dim] = t.max[i], to[head_dim + 1] = t.sum[i];
  }
}

int64_t MergeAttention::tasks(const Run& r) const {
  if (r.n_tokens() > kSplitTokens) return 0;
  for (const Segment& g : r.batch.segments)
    if (split(g.pos + g.n).n > 1) return int64_t(r.n_tokens()) * heads;
  return 0;
}

void MergeAttention::task(const Run& r, int64_t task) const {
  const int64_t token = task / heads, part = part_floats(head_dim);
  const Segment& seg = r.segment_of(token);
  const int n = split(seg.pos + seg.n).n;
  if (n == 1) return;
  const float* parts = reinterpret_cast<const float*>(r.shared()) + task * kMaxSplits * part;
  float* y = r.row(out, token) + task % heads * head_dim;
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
}

}  // namespace deskside
