// Kernels that work along a row or along the sequence: norms, gates, convolution, gated delta net,
// attention, routing. Compiled once per instruction set (DESKSIDE_ISA).
#include "matmul_entry.h"
#include "quants.h"
#include "simd.h"

#include <math.h>

namespace deskside {
namespace {

// Applies f to vectors of rows of floats, the last ones through zero-padded copies.
template <class F> inline void each(int64_t n, const float* a, const float* b, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i), load(b + i)));
  if (i < n) {
    float pa[kLanes] = {}, pb[kLanes] = {}, py[kLanes];
    memcpy(pa, a + i, size_t(n - i) * 4);
    memcpy(pb, b + i, size_t(n - i) * 4);
    store(py, f(load(pa), load(pb)));
    memcpy(y + i, py, size_t(n - i) * 4);
  }
}

float inverse_rms(const float* x, int n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / n + eps); }

void rms_norm(const float* x, const float* w, int n, float eps, float* y) {
  const float scale = inverse_rms(x, n, eps);
  each(n, x, w, y, [scale](vf a, vf b) { return a * scale * b; });
}

void gated_norm(const float* x, const float* z, const float* w, int n, float eps, float* y) {
  const float scale = inverse_rms(x, n, eps);
  each(n, x, w, y, [scale](vf a, vf b) { return a * scale * b; });
  each(n, y, z, y, [](vf a, vf g) { return a * g * vsigmoid(g); });
}

void unit_norm(float* x, int n, float eps, float scale) {
  const float s = scale / sqrtf(dot(x, x, n) + eps);
  each(n, x, x, x, [s](vf a, vf) { return a * s; });
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  each(n, gate, up, y, [](vf g, vf u) { return g * vsigmoid(g) * u; });
}

void sigmoid_gate(const float* x, const float* gate, int64_t n, bool per_row, float* y) {
  if (per_row) {
    const float s = sigmoid1(*gate);
    each(n, x, x, y, [s](vf a, vf) { return a * s; });
  } else {
    each(n, x, gate, y, [](vf a, vf g) { return a * vsigmoid(g); });
  }
}

void add(const float* x, const float* y, int64_t n, float* out) {
  each(n, x, y, out, [](vf a, vf b) { return a + b; });
}

void axpy(float a, const float* x, int64_t n, float* y) {
  each(n, x, y, y, [a](vf u, vf v) { return v + a * u; });
}

void conv_silu(const float* x, int n, int channels, int kernel, const float* w, int64_t width,
               float* state, float* y, int64_t ldy) {
  // Input t of the sequence: before this call's tokens it is in the state, oldest first.
  const auto input = [&](int t) {
    return t < 0 ? state + int64_t(kernel - 1 + t) * width : x + int64_t(t) * channels;
  };
  for (int t = 0; t < n; t++) {
    float* out = y + int64_t(t) * ldy;
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      vf s = vf{};
      for (int j = 0; j < kernel; j++)
        s += load(w + int64_t(j) * width + c) * load(input(t - kernel + 1 + j) + c);
      store(out + c, s * vsigmoid(s));
    }
    for (; c < channels; c++) {
      float s = 0;
      for (int j = 0; j < kernel; j++)
        s += w[int64_t(j) * width + c] * input(t - kernel + 1 + j)[c];
      out[c] = s * sigmoid1(s);
    }
  }
  // Ascending rows: a row still needed is read before it is written.
  for (int j = 0; j < kernel - 1; j++)
    memmove(state + int64_t(j) * width, input(n - kernel + 1 + j), size_t(channels) * 4);
}

// ---- gated delta net ----------------------------------------------------------------------------
//
// One token, one pass that reads the state and one that updates it (FACTS 1.4). With the old S:
//   p = S^T k, r = S^T q;  delta = beta (v - e^g p);  o = e^g r + delta (k . q);  S = e^g S + k delta^T
// Value columns are independent, so a call works on a slice of columns that stays in L1.

template <class V> inline V load_as(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// One token's q and k, and from column c on its v and result; the state's rows are `pitch` apart.
struct DeltaToken {
  const float *q, *k, *v;
  float decay, beta, kq;
  float* out;
};

// N vectors of type V (or float, for odd widths) of columns.
template <class V, int N>
void delta_columns(const DeltaToken& t, float* column, int dim, int pitch, int c) {
  constexpr int lanes = int(sizeof(V) / 4);
  const float *q = t.q, *k = t.k;
  const float decay = t.decay;
  V p[N], r[N];
  for (int j = 0; j < N; j++) p[j] = r[j] = V{};
  for (int i = 0; i < dim; i++) {
    for (int j = 0; j < N; j++) {
      const V x = load_as<V>(column + int64_t(i) * pitch + j * lanes);
      p[j] += x * k[i];
      r[j] += x * q[i];
    }
  }
  V delta[N];
  for (int j = 0; j < N; j++) {
    delta[j] = (load_as<V>(t.v + c + j * lanes) - p[j] * decay) * t.beta;
    const V o = r[j] * decay + delta[j] * t.kq;
    memcpy(t.out + c + j * lanes, &o, sizeof o);
  }
  for (int i = 0; i < dim; i++) {
    for (int j = 0; j < N; j++) {
      float* at = column + int64_t(i) * pitch + j * lanes;
      const V x = load_as<V>(at) * decay + delta[j] * k[i];
      memcpy(at, &x, sizeof x);
    }
  }
}

void gated_delta(const DeltaSlice& s) {
  // Rows of a slice lie a whole head's row apart, which maps them to few sets of L1. Over several
  // tokens they are gathered.
  constexpr int kGathered = 8192;  // floats: 32 KiB
  const int columns = s.c1 - s.c0;
  float gathered[kGathered];
  const bool gather = s.n > 1 && int64_t(s.dim) * columns <= kGathered;
  float* state = gather ? gathered : s.state + s.c0;
  const int pitch = gather ? columns : s.dim;
  const auto copy = [&](bool in) {
    for (int i = 0; i < s.dim; i++) {
      float *far = s.state + int64_t(i) * s.dim + s.c0, *near = gathered + int64_t(i) * columns;
      memcpy(in ? near : far, in ? far : near, size_t(columns) * 4);
    }
  };
  if (gather) copy(true);
  for (int t = 0; t < s.n; t++) {
    const float *q = s.q + t * s.stride, *k = s.k + t * s.stride;
    const DeltaToken token{q,
                           k,
                           s.v + t * s.stride + s.c0,
                           s.decay[t * s.gate_stride],
                           s.beta[t * s.gate_stride],
                           dot(k, q, s.dim),
                           s.out + t * s.out_stride + s.c0};
    int c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes)
      delta_columns<vf, 4>(token, state + c, s.dim, pitch, c);
    for (; c + kLanes <= columns; c += kLanes)
      delta_columns<vf, 1>(token, state + c, s.dim, pitch, c);
    for (; c < columns; c++) delta_columns<float, 1>(token, state + c, s.dim, pitch, c);
  }
  if (gather) copy(false);
}

// ---- attention ----------------------------------------------------------------------------------

void store_kv(const float* x, int n, Type type, uint8_t* dst) {
  if (type == Type::F32) {
    memcpy(dst, x, size_t(n) * 4);
  } else if (type == Type::F16) {
    for (int i = 0; i < n; i++) {
      const uint16_t h = float_to_f16(x[i]);
      memcpy(dst + 2 * i, &h, 2);
    }
  } else {
    for (int b = 0; b < n / 32; b++) {
      BlockQ8_0 block;
      float top = 0, poison = 0;  // NaN if any value is NaN or infinite
      for (int i = 0; i < 32; i++) {
        top = fmaxf(top, fabsf(x[32 * b + i]));
        poison += x[32 * b + i] * 0.0f;
      }
      const bool finite = poison == 0;
      const float d = top / 127.0f, inverse = d > 0 && finite ? 1.0f / d : 0.0f;
      for (int i = 0; i < 32; i++)
        block.qs[i] = finite ? int8_t(lrintf(x[32 * b + i] * inverse)) : int8_t(0);
      block.d = float_to_f16(d + poison);
      memcpy(dst + sizeof block * size_t(b), &block, sizeof block);
    }
  }
}

void load_kv(const uint8_t* src, Type type, int n, float* y) {
  if (type == Type::F32) {
    memcpy(y, src, size_t(n) * 4);
  } else if (type == Type::F16) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                  reinterpret_cast<const __m128i*>(src + 2 * i))));
#endif
    for (; i < n; i++) {
      uint16_t h;
      memcpy(&h, src + 2 * i, 2);
      y[i] = f16_to_float(h);
    }
  } else {
    for (int b = 0; b < n / 32; b++) {
      const auto* block = reinterpret_cast<const BlockQ8_0*>(src) + b;
      const float d = f16_to_float(block->d);
      for (int i = 0; i < 32; i++) y[32 * b + i] = d * block->qs[i];
    }
  }
}

// scores[r][p] for R rows and P keys.
template <int R, int P>
inline void score(const float* const* q, const float* k, int dim, float scale, float* scores) {
  vf acc[R][P];
  float tail[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) acc[r][p] = vf{}, tail[r][p] = 0;
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes)
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) acc[r][p] += load(q[r] + c) * load(k + p * dim + c);
  for (; c < dim; c++)
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) tail[r][p] += q[r][c] * k[p * dim + c];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      scores[r * kKeyBlock + p] = (sum(acc[r][p]) + tail[r][p]) * scale;
}

// acc[r] += sum over n values of weight[r][p] * v[p], for R rows.
template <int R>
inline void accumulate(const float* weight, const float* v, int n, int dim, float* acc) {
  int c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes) {
    vf a[R][4];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) a[r][j] = load(acc + r * dim + c + j * kLanes);
    for (int p = 0; p < n; p++) {
      for (int j = 0; j < 4; j++) {
        const vf x = load(v + p * dim + c + j * kLanes);
        for (int r = 0; r < R; r++) a[r][j] += x * weight[r * kKeyBlock + p];
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) store(acc + r * dim + c + j * kLanes, a[r][j]);
  }
  for (; c < dim; c++)
    for (int r = 0; r < R; r++)
      for (int p = 0; p < n; p++) acc[r * dim + c] += weight[r * kKeyBlock + p] * v[p * dim + c];
}

// Online softmax: result so far = acc / sum, with weights e^(score - max).
void attention(const AttentionTile& t) {
  const int dim = t.head_dim, rows = t.n_rows;
  float* block = t.work;                              // kKeyBlock keys, then values
  float* scores = block + int64_t(kKeyBlock) * dim;   // (rows, kKeyBlock), then weights
  for (int r = 0; r < rows; r++) t.max[r] = -INFINITY, t.sum[r] = 0;
  memset(t.acc, 0, size_t(rows) * size_t(dim) * 4);

  for (int64_t p0 = t.begin; p0 < t.end; p0 += kKeyBlock) {
    const int n = int(t.end - p0 < kKeyBlock ? t.end - p0 : kKeyBlock);
    for (int p = 0; p < n; p++) load_kv(t.k + (p0 + p) * t.k_row, t.k_type, dim, block + p * dim);
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      int p = 0;
      for (; p + 2 <= n; p += 2)
        score<4, 2>(t.q + r, block + p * dim, dim, t.scale, scores + r * kKeyBlock + p);
      if (p < n) score<4, 1>(t.q + r, block + p * dim, dim, t.scale, scores + r * kKeyBlock + p);
    }
    for (; r < rows; r++)
      for (int p = 0; p < n; p++)
        score<1, 1>(t.q + r, block + p * dim, dim, t.scale, scores + r * kKeyBlock + p);

    for (r = 0; r < rows; r++) {
      float* s = scores + r * kKeyBlock;
      const int64_t last = t.pos0 + r / t.group;  // causal
      const int visible = int(last - p0 + 1 < n ? last - p0 + 1 : n);
      float top = t.max[r];
      for (int p = 0; p < visible; p++) top = s[p] > top ? s[p] : top;
      // -inf as a score gives weight 0; so do keys behind the token's own position.
      for (int p = visible > 0 ? visible : 0; p < kKeyBlock; p++) s[p] = -INFINITY;
      if (top == -INFINITY) {
        memset(s, 0, kKeyBlock * 4);
        continue;
      }
      vf total = vf{};
      for (int p = 0; p < kKeyBlock; p += kLanes) {
        const vf raw = load(s + p);
        const vf e = vexp(raw - top);
        const vf w = raw == splat(-INFINITY) ? vf{} : e;  // a NaN stays one
        store(s + p, w);
        total += w;
      }
      const float keep = t.max[r] == -INFINITY ? 0.0f : exp1(t.max[r] - top);
      t.sum[r] = t.sum[r] * keep + sum(total);
      t.max[r] = top;
      if (keep != 1.0f)
        each(dim, t.acc + int64_t(r) * dim, t.acc + int64_t(r) * dim, t.acc + int64_t(r) * dim,
             [keep](vf a, vf) { return a * keep; });
    }

    for (int p = 0; p < n; p++) load_kv(t.v + (p0 + p) * t.v_row, t.v_type, dim, block + p * dim);
    r = 0;
    for (; r + 2 <= rows; r += 2)
      accumulate<2>(scores + r * kKeyBlock, block, n, dim, t.acc + int64_t(r) * dim);
    if (r < rows) accumulate<1>(scores + r * kKeyBlock, block, n, dim, t.acc + int64_t(r) * dim);
  }
}

// ---- routing ------------------------------------------------------------------------------------

void route(const float* logits, int n, int k, float* ids, float* weights) {
  // Insertion into the k best so far; strict comparison keeps the lower index first among equals.
  int found = 0;
  for (int e = 0; e < n; e++) {
    const float x = logits[e];
    if (found == k && !(x > weights[k - 1])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x > weights[at - 1]; at--) {
      weights[at] = weights[at - 1];
      ids[at] = ids[at - 1];
    }
    weights[at] = x;
    ids[at] = float(e);
  }
  const float top = weights[0];
  float total = 0;
  for (int i = 0; i < k; i++) total += weights[i] = expf(weights[i] - top);
  for (int i = 0; i < k; i++) weights[i] /= total;
}

}  // namespace

#define DESKSIDE_CONCAT(a, b) a##b
#define DESKSIDE_TABLE(isa) DESKSIDE_CONCAT(kernels_, isa)
#define DESKSIDE_STRING(x) #x
#define DESKSIDE_NAME(isa) DESKSIDE_STRING(isa)

extern const Kernels DESKSIDE_TABLE(DESKSIDE_ISA) = {
    DESKSIDE_NAME(DESKSIDE_ISA),
    DESKSIDE_ISA::quantize,
    DESKSIDE_ISA::matmul,
    DESKSIDE_ISA::matmul_pair,
    DESKSIDE_ISA::dot_peak,
    rms_norm,
    gated_norm,
    unit_norm,
    swiglu,
    sigmoid_gate,
    add,
    axpy,
    conv_silu,
    gated_delta,
    store_kv,
    attention,
    route,
};

}  // namespace deskside
