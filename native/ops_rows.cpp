// Ops that treat each row on its own: embedding, norms, matrices, rope, gates, routing.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"
#include "scratch.h"

namespace deskside {

namespace {
int rows_of(const Run& r, bool per_output) {
  return per_output ? int(r.batch.outputs.size()) : r.n_tokens();
}

// Rows of w that one task computes: at least 64 KiB of weights, so that each stream is long, but
// enough tasks to keep every thread busy to the end.
int64_t rows_per_task(const Matrix& w, int threads) {
  const int64_t stream = (int64_t(64) << 10) / w.row_bytes;
  const int64_t share = w.rows / (int64_t(threads) * 4);
  return std::max<int64_t>(kTileRows, std::min(stream, share) / kTileRows * kTileRows);
}
}  // namespace

void Embed::run(const Run& r) const {
  r.team.for_each(r.n_tokens(), [&](int64_t t) {
    r.kernels.dequantize_row(table, r.batch.tokens[size_t(t)], r.at(out) + t * out.width, r.tile());
  });
}

void Norm::run(const Run& r) const {
  const int groups = in.width / group;
  r.team.for_each(rows_of(r, per_output), [&](int64_t t) {
    for (int g = 0; g < groups; g++) {
      const int64_t i = t * in.width + int64_t(g) * group;
      if (gated)
        r.kernels.gated_norm(r.at(in) + i, r.at(gate) + i, weight, group, eps, r.at(out) + i);
      else
        r.kernels.rms_norm(r.at(in) + i, weight, group, eps, r.at(out) + i);
    }
  });
}

int64_t Linear::scratch_bytes(int64_t max_tokens, int) const {
  Carver c(nullptr);
  c.rows(max_tokens, in.width, nullptr);
  return c.used();
}

void Linear::run(const Run& r) const {
  const int n = rows_of(r, per_output);
  if (n == 0) return;
  const Rows x = Carver(r.scratch()).rows(n, in.width, r.at(in));
  const auto quantised = [](const Part& p) { return !is_float(p.w.type); };
  if (std::any_of(parts.begin(), parts.end(), quantised)) {
    quantize_rows(r, x, n);
    r.team.barrier();
  }
  int64_t tasks = 0;
  for (const Part& p : parts) {
    const int64_t rows = rows_per_task(p.w, r.team.size());
    tasks += (p.w.rows + rows - 1) / rows;
  }
  r.team.for_each(tasks, [&](int64_t task) {
    for (const Part& p : parts) {
      const int64_t rows = rows_per_task(p.w, r.team.size());
      const int64_t own = (p.w.rows + rows - 1) / rows;
      if (task >= own) {
        task -= own;
        continue;
      }
      float* y = p.to_logits ? r.batch.logits : r.at(p.out);
      const int64_t first = task * rows;
      r.kernels.matmul(p.w, first, std::min(first + rows, p.w.rows), x, nullptr, n, y, p.w.rows,
                       r.tile());
      return;
    }
  });
}

void SplitGate::run(const Run& r) const {
  const size_t bytes = size_t(head_dim) * 4;
  r.team.for_each(r.n_tokens(), [&](int64_t t) {
    const float* x = r.at(in) + t * in.width;
    for (int64_t h = 0; h < heads; h++) {
      std::memcpy(r.at(out) + t * out.width + h * head_dim, x + 2 * h * head_dim, bytes);
      std::memcpy(r.at(gate) + t * gate.width + h * head_dim, x + (2 * h + 1) * head_dim, bytes);
    }
  });
}

void Rope::run(const Run& r) const {
  const int half = n_rot / 2;
  r.team.for_each(int64_t(r.batch.segments.size()), [&](int64_t s) {
    const Segment& seg = r.batch.segments[size_t(s)];
    for (int i = 0; i < seg.n; i++) {
      const float* x = r.at(in) + int64_t(seg.row + i) * in.width;
      float* y = r.at(out) + int64_t(seg.row + i) * out.width;
      std::memcpy(y, x, size_t(in.width) * 4);
      for (int p = 0; p < half; p++) {
        const double angle = double(seg.pos + i) * inv_freq[size_t(p)];
        const float c = float(std::cos(angle)), sn = float(std::sin(angle));
        const int a = neox ? p : 2 * p, b = neox ? p + half : 2 * p + 1;
        for (int64_t h = 0; h < heads; h++) {
          const float u = x[h * head_dim + a], v = x[h * head_dim + b];
          y[h * head_dim + a] = u * c - v * sn;
          y[h * head_dim + b] = u * sn + v * c;
        }
      }
    }
  });
}

void Binary::run(const Run& r) const {
  r.team.for_each(r.n_tokens(), [&](int64_t t) {
    const float *a = r.at(x) + t * x.width, *b = r.at(y) + t * y.width;
    float* to = r.at(out) + t * out.width;
    switch (kind) {
      case kSwiglu: r.kernels.swiglu(a, b, out.width, to); break;
      case kSigmoidGate:
        r.kernels.sigmoid_gate(a, b, out.width, y.width == 1 && out.width != 1, to);
        break;
      case kAdd: r.kernels.add(a, b, out.width, to); break;
    }
  });
}

void Route::run(const Run& r) const {
  r.team.for_each(r.n_tokens(), [&](int64_t t) {
    r.kernels.route(r.at(logits) + t * logits.width, logits.width, top_k, r.at(ids) + t * top_k,
                    r.at(weights) + t * top_k);
  });
}

void TakeRows::run(const Run& r) const {
  const auto& rows = r.batch.outputs;
  r.team.for_each(int64_t(rows.size()), [&](int64_t i) {
    std::memcpy(r.at(out) + i * out.width, r.at(in) + int64_t(rows[size_t(i)]) * in.width,
                size_t(in.width) * 4);
  });
}

}  // namespace deskside
