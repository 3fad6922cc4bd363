// Routed experts: tokens are sorted by expert, each expert's matrices are read once for all its
// tokens, and a token's results are added in the order of its routing, so that neither the number of
// threads nor the rest of the batch changes a sum.
#include <algorithm>

#include "ops.h"
#include "scratch.h"

namespace deskside {

namespace {
constexpr int kRows = 32;  // rows of gate and up, or of down, that one task computes
}

// A pair is one (token, chosen expert); pairs stand sorted by expert.
struct Experts::Scratch {
  Rows x;             // the tokens
  Rows h;             // per pair: silu(gate) * up, then the same in 8 bits
  float* h_values;    // (pairs, width)
  float* y;           // (pairs, D)
  int32_t* token;     // per pair: its token
  int32_t* place;     // per (token, k): its pair
  int32_t* first;     // per active expert: its first pair; one more entry ends the last
  int32_t* active;    // experts with at least one token
  int32_t* n_active;
  float* local;       // per thread: gate and up results of one task
  int64_t per_thread;
  int64_t bytes;
};

Experts::Scratch Experts::layout(uint8_t* base, int64_t max_tokens, int threads) const {
  const int64_t pairs = max_tokens * top_k;
  Carver c(base);
  Scratch s;
  s.x = c.rows(max_tokens, in.width, nullptr);
  s.h_values = c.take<float>(pairs * width);
  s.h = c.rows(pairs, width, s.h_values);
  s.y = c.take<float>(pairs * in.width);
  s.token = c.take<int32_t>(pairs);
  s.place = c.take<int32_t>(pairs);
  s.first = c.take<int32_t>(n_expert + 1);
  s.active = c.take<int32_t>(n_expert);
  s.n_active = c.take<int32_t>(1);
  s.per_thread = 2 * max_tokens * kRows;
  s.local = c.take<float>(s.per_thread * threads);
  s.bytes = c.used();
  return s;
}

int64_t Experts::scratch_bytes(int64_t max_tokens, int threads) const {
  return layout(nullptr, max_tokens, threads).bytes;
}

void Experts::run(const Run& r) const {
  const int n = r.n_tokens();
  Scratch s = layout(r.scratch(), n, r.team.size());
  s.x.f = r.at(in);
  const bool quantise_x = !is_float(gate.type) || !is_float(up.type);

  // 1. Sort the pairs by expert; meanwhile round the tokens to 8 bits.
  if (r.thread == 0) {
    const float* chosen = r.at(ids);
    std::vector<int32_t> count(size_t(n_expert) + 1, 0);
    for (int i = 0; i < n * top_k; i++) count[size_t(chosen[i])]++;
    int32_t pair = 0, active_count = 0;
    for (int e = 0; e < n_expert; e++) {
      const int32_t own = count[size_t(e)];
      count[size_t(e)] = pair;
      if (own == 0) continue;
      s.active[active_count] = e;
      s.first[active_count++] = pair;
      pair += own;
    }
    s.first[active_count] = pair;
    *s.n_active = active_count;
    for (int i = 0; i < n * top_k; i++) {
      const int32_t at = count[size_t(chosen[i])]++;
      s.token[at] = i / top_k;
      s.place[i] = at;
    }
  }
  if (quantise_x) quantize_rows(r, s.x, n);
  r.team.barrier();

  // 2. h = silu(W_gate x) * (W_up x).
  const auto of_expert = [](const Matrix& all, int64_t rows, int64_t e) {
    return Matrix{all.data + e * rows * all.row_bytes, all.type, rows, all.cols, all.row_bytes};
  };
  const int64_t active_experts = *s.n_active;
  const int64_t h_chunks = (width + kRows - 1) / kRows;
  r.team.for_each(active_experts * h_chunks, [&](int64_t task) {
    const int64_t a = task / h_chunks, r0 = task % h_chunks * kRows;
    const int64_t r1 = std::min<int64_t>(r0 + kRows, width), e = s.active[a];
    const int32_t p0 = s.first[a], m = s.first[a + 1] - p0;
    float* g = s.local + r.thread * s.per_thread;
    float* u = g + int64_t(n) * kRows;
    const Matrix wg = of_expert(gate, width, e), wu = of_expert(up, width, e);
    r.kernels.matmul(wg, r0, r1, s.x, s.token + p0, m, g - r0, kRows, r.tile());
    r.kernels.matmul(wu, r0, r1, s.x, s.token + p0, m, u - r0, kRows, r.tile());
    for (int32_t i = 0; i < m; i++)
      r.kernels.swiglu(g + i * kRows, u + i * kRows, r1 - r0, s.h_values + (p0 + i) * int64_t(width) + r0);
  });
  r.team.barrier();

  if (!is_float(down.type)) {
    quantize_rows(r, s.h, int64_t(n) * top_k);
    r.team.barrier();
  }

  // 3. y = W_down h, per pair.
  const int64_t y_chunks = (out.width + kRows - 1) / kRows;
  r.team.for_each(active_experts * y_chunks, [&](int64_t task) {
    const int64_t a = task / y_chunks, r0 = task % y_chunks * kRows;
    const int64_t r1 = std::min<int64_t>(r0 + kRows, out.width), e = s.active[a];
    const int32_t p0 = s.first[a], m = s.first[a + 1] - p0;
    Rows h = s.h;
    h.f += p0 * h.cols;
    h.q += p0 * h.cols;
    h.d += p0 * (h.cols / 32);
    h.s += p0 * (h.cols / 32);
    r.kernels.matmul(of_expert(down, out.width, e), r0, r1, h, nullptr, m,
                     s.y + int64_t(p0) * out.width, out.width, r.tile());
  });
  r.team.barrier();

  // 4. Weighted sum of a token's experts.
  r.team.for_each(n, [&](int64_t t) {
    float* y = r.at(out) + t * out.width;
    std::fill(y, y + out.width, 0.0f);
    for (int64_t i = t * top_k; i < (t + 1) * top_k; i++)
      r.kernels.axpy(r.at(weights)[i], s.y + int64_t(s.place[i]) * out.width, out.width, y);
  });
}

}  // namespace deskside
