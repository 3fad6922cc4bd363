// Matrices and routed experts.
//
// Experts: the pairs of (token, selected expert) are sorted by expert. Each expert's matrices are
// read once for all its tokens. A token's results are added by ascending id of its experts. So
// neither the number of threads nor the rest of the batch changes a sum.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "scratch.h"

namespace deskside {

namespace {
constexpr int64_t kStream = int64_t(128) << 10;  // bytes of weights that a task reads as one stream

int64_t chunks(int64_t panels, int64_t chunk) { return (panels + chunk - 1) / chunk; }
}  // namespace

template <class F>
void GatedPair::run(const Run& r, const PanelRange& panels, const Rows& x, F&& done) const {
  const int64_t rows = (panels.end - panels.begin) * kPanelRows;
  float *g = r.work(), *u = g + kTokens * rows;
  for (int i = 0; i < x.n; i += kTokens) {
    Rows part = x;
    part.n = std::min(kTokens, x.n - i);
    if (x.index)
      part.index += i;
    else
      part.f += i * x.stride, part.q += i * record_bytes(x.cols);
    r.kernels.matmul_pair(gate, up, panels, part, {g, rows}, {u, rows}, r.tile());
    for (int k = 0; k < part.n; k++) {
      r.kernels.swiglu(g + k * rows, u + k * rows, rows, g + k * rows);
      done(i + k, g + k * rows);
    }
  }
}

// ---- linear -------------------------------------------------------------------------------------

int Linear::rows_of(const Run& r) const {
  return per_output ? int(r.batch.outputs.size()) : r.n_tokens();
}

int64_t Linear::chunk(const Part& p, const Run& r) const {
  if (rows_of(r) > kFew) return kPanels;
  // Long streams, but enough tasks to keep every thread busy to the end.
  const int64_t stream = kStream / p.w.stride, share = p.w.panels() / (int64_t(r.n_threads) * 4);
  return std::clamp<int64_t>(std::min(stream, share), 1, GatedPair::kPanels);
}

int64_t Linear::work_floats(int64_t max_tokens) const {
  // A convolution's inputs.
  const int64_t conv =
      std::max<int64_t>(kFew * GatedPair::kPanels, max_tokens * kPanels) * kPanelRows;
  return std::max(conv, GatedPair::kWork);
}

int64_t Linear::tasks(const Run& r) const {
  if (rows_of(r) == 0) return 0;
  int64_t n = 0;
  for (const Part& p : parts) n += chunks(p.w.panels(), chunk(p, r));
  return n;
}

void Linear::task(const Run& r, int64_t i) const {
  for (const Part& p : parts) {
    const int64_t size = chunk(p, r), own = chunks(p.w.panels(), size);
    if (i < own) return run_part(p, r, i * size, std::min((i + 1) * size, p.w.panels()));
    i -= own;
  }
}

void Linear::run_part(const Part& p, const Run& r, int64_t p0, int64_t p1) const {
  const int n = rows_of(r);
  const Rows x = in.rows(r, n);
  const int64_t first = p0 * kPanelRows, end = std::min(p1 * kPanelRows, p.w.rows);
  if (p.has_up) {
    const GatedPair pair{p.w, p.up};
    pair.run(r, {p0, p1}, x, [&](int i, const float* values) {
      std::memcpy(r.row(p.out, i) + first, values, size_t(end - first) * 4);
    });
    return;
  }
  if (p.kernel == 0) {
    const Results y =
        p.to_logits ? Results{r.batch.logits, p.w.rows} : Results{r.at(p.out), p.out.stride};
    r.kernels.matmul(p.w, {p0, p1}, x, {y.at + first, y.stride}, r.tile());
    return;
  }
  const int channels = int(end - first);
  r.kernels.matmul(p.w, {p0, p1}, x, {r.work(), channels}, r.tile());
  const State& s = r.state(p.state);
  for (const Segment& seg : r.batch.segments)
    r.kernels.conv_silu(r.work() + int64_t(seg.row) * channels, seg.n, channels, p.kernel,
                        p.taps.data() + first, p.w.rows,
                        reinterpret_cast<float*>(s.k + seg.slot * s.k_slot) + first,
                        r.row(p.out, seg.row) + first, p.out.stride);
}

// ---- experts ------------------------------------------------------------------------------------

Routing::Routing(uint8_t* base, int n_expert, int64_t pairs) {
  Carver c(base);
  n_active = c.take<int32_t>(1);
  active = c.take<int32_t>(n_expert);
  first = c.take<int32_t>(n_expert + 1);
  pair = c.take<int32_t>(pairs);
  token = c.take<int32_t>(pairs);
  count = c.take<int32_t>(n_expert);
  bytes = c.used();
}

void SortExperts::row(const Run& r, int64_t) const {
  const Routing t = shape.routing(r);
  // -1 stands for an expert that another device computes. Other invalid ids must not index memory.
  const auto chosen = [&](int i) {
    const float id = r.row(ids, i / shape.top_k)[i % shape.top_k];
    return id >= 0 && id < float(shape.n_expert) ? int(id) : -1;
  };
  const int pairs = r.n_tokens() * shape.top_k;
  std::fill_n(t.count, shape.n_expert, 0);
  for (int i = 0; i < pairs; i++)
    if (const int e = chosen(i); e >= 0) t.count[e]++;
  int32_t at = 0, n_active = 0;
  for (int e = 0; e < shape.n_expert; e++) {
    const int32_t own = t.count[e];
    t.count[e] = at;
    if (own == 0) continue;
    t.active[n_active] = e;
    t.first[n_active++] = at;
    at += own;
  }
  t.first[n_active] = at;
  *t.n_active = n_active;
  for (int i = 0; i < pairs; i++) {
    const int e = chosen(i);
    if (e < 0) continue;
    const int32_t to = t.count[e]++;
    t.pair[to] = i;
    t.token[to] = i / shape.top_k;
  }
}

namespace {
// Panels of a task: 32 results, since a block of 8-bit rounding must come from one task.
constexpr int64_t kUpPanels = 2;

Weights of_expert(const Weights& all, int n_expert, int64_t e) {
  Weights w = all;
  w.rows = all.rows / n_expert;
  w.data += e * w.panels() * w.stride;
  return w;
}
}  // namespace

int64_t ExpertsUp::tasks(const Run& r) const {
  return *shape.routing(r).n_active * chunks(shape.up_panels(), kUpPanels);
}

void ExpertsUp::task(const Run& r, int64_t i) const {
  const Routing t = shape.routing(r);
  const int64_t panels = shape.up_panels();
  const int64_t own = chunks(panels, kUpPanels), a = i / own, e = t.active[a];
  const int64_t p0 = i % own * kUpPanels, p1 = std::min(p0 + kUpPanels, panels);
  const int64_t first = p0 * kPanelRows,
                n = std::min<int64_t>(p1 * kPanelRows, shape.width) - first;
  const int32_t pair0 = t.first[a], m = t.first[a + 1] - pair0;
  const GatedPair pair{of_expert(weights.gate, shape.n_expert, e),
                       of_expert(weights.up, shape.n_expert, e)};
  const Rows x = in.rows(r, m, t.token + pair0);
  pair.run(r, {p0, p1}, x, [&](int k, const float* values) {
    const int64_t at = pair0 + k;
    if (out.q.width > 0)
      r.kernels.quantize(values, first, n, r.record(out.q, at, shape.width), shape.width);
    else
      std::memcpy(r.at(out.f) + at * shape.width + first, values, size_t(n) * 4);
  });
}

int64_t ExpertsDown::chunk(const Run& r) const {
  // Long streams of every expert, but sums that fit in L2.
  const int64_t stream = kStream / down.stride, panels = out.width / kPanelRows;
  const int64_t sums = kSums / (kPanelRows * r.n_tokens());
  return std::clamp<int64_t>(std::min({stream, sums, panels / (int64_t(r.n_threads) * 8)}), 2,
                             kMaxPanels);
}

int64_t ExpertsDown::work_floats(int64_t max_tokens) const {
  const int64_t sums = std::max<int64_t>(kSums, max_tokens * 2 * kPanelRows);
  return 2 * std::max<int64_t>(sums, kMaxPanels * kPanelRows);
}

int64_t ExpertsDown::tasks(const Run& r) const { return chunks(panels_of(out.width), chunk(r)); }

void ExpertsDown::task(const Run& r, int64_t i) const {
  const Routing t = shape.routing(r);
  const int64_t size = chunk(r), p0 = i * size;
  const int64_t p1 = std::min(p0 + size, panels_of(out.width));
  const int64_t first = p0 * kPanelRows, n = std::min<int64_t>(p1 * kPanelRows, out.width) - first;
  float *sums = r.work(), *products = sums + r.n_tokens() * n;
  std::fill_n(sums, r.n_tokens() * n, 0.0f);
  for (int a = 0; a < *t.n_active; a++) {
    const Weights w = of_expert(down, shape.n_expert, t.active[a]);
    for (int64_t k = t.first[a]; k < t.first[a + 1]; k += kTokens) {
      const int m = int(std::min<int64_t>(kTokens, t.first[a + 1] - k));
      const Rows h{r.at(in.f) + k * shape.width, r.record(in.q, k, shape.width), shape.width,
                   shape.width, m};
      const bool last = k + m >= t.first[a + 1] && a + 1 < *t.n_active;
      const uint8_t* then =
          last ? of_expert(down, shape.n_expert, t.active[a + 1]).data + p0 * down.stride : nullptr;
      r.kernels.matmul(w, {p0, p1, then}, h, {products, n}, r.tile());
      for (int j = 0; j < m; j++)
        r.kernels.axpy(r.row(weights, t.token[k + j])[t.pair[k + j] % shape.top_k],
                       products + j * n, n, sums + t.token[k + j] * n);
    }
  }
  for (int64_t token = 0; token < r.n_tokens(); token++)
    std::copy_n(sums + token * n, n, r.row(out, token) + first);
}

}  // namespace deskside
