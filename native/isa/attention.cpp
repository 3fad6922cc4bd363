// Attention over a KV cache, and the cache's encoding. Compiled once per instruction set.
//
// Scores are vectors over query rows: score[key][row] = sum_c key[c] * q[c][row]. One number of the
// key multiplies a vector of packed queries. So keys need no packing, and the softmax of all rows
// runs in parallel lanes. A key's weights are adjacent, as weight[key][row] * value[key] needs
// them. With fewer rows than lanes, a vector has D dimensions of each row, which are added at the
// end.
#include "kv_cache.h"
#include "reduce.h"
#include "sequence_entry.h"

namespace deskside {
namespace {

// Keys scored together. Times two vectors of rows, they are as many sums as fit into registers
// beside the operands. add_groups needs a multiple of D / 2.
template <int D> constexpr int kKeys = kLanes == 16 ? 8 : D == 8 ? 4 : 6;
static_assert(kKeys<1> <= kMaxKeys);

constexpr int kStrip = 32;   // columns of values decoded at a time: one block of q8_0
constexpr int kBetween = 8;  // values between two prefetches

inline int whole_strips(int dim) { return (dim + kStrip - 1) / kStrip * kStrip; }

// Prefetches a part of the cache to L2 during other work, `step` bytes at a time. All at once would
// fill the core's miss buffers and stall that work.
struct Ahead {
  const uint8_t* at;
  int64_t step;

  Ahead(const Source& s, int64_t first, int64_t end, int64_t steps)
      : at(s.rows + first * s.row_bytes),
        step(first < end ? ((end - first) * s.row_bytes + steps - 1) / steps : 0) {}
  void next() {
    for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += step;
  }
};

// ---- scores -------------------------------------------------------------------------------------

// A vector that repeats the D floats at p.
template <int D> inline vf repeat(const float* p) {
  if constexpr (D == 1) {
    return *p - vf{};
  } else if constexpr (D == kLanes) {
    return load(p);
  } else if constexpr (D == 2) {
    typedef int64_t pairs __attribute__((vector_size(4 * kLanes)));
    int64_t x;
    memcpy(&x, p, 8);
    return (vf)(pairs{} + x);
  } else {
#if defined(DESKSIDE_AVX512)
    if constexpr (D == 4)
      return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
    else
      return (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
    return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    float y[kLanes];
    for (int i = 0; i < kLanes; i += D) memcpy(y + i, p, 4 * D);
    return load(y);
#endif
  }
}

// Packs queries in groups of two vectors of rows: [group][dim / D][2 kLanes / D rows][D].
template <int D>
void pack_queries(const float* const* q, int n, int dim, int padded_dim, int rows, float scale,
                  float* to) {
  constexpr int unit = 2 * kLanes / D;
  memset(to, 0, size_t(rows) * size_t(padded_dim) * 4);
  for (int r = 0; r < n; r++) {
    float* y = to + int64_t(r / unit) * unit * padded_dim + r % unit * D;
    int c = 0;
    for (; c + D <= dim; c += D)
      for (int i = 0; i < D; i++) y[int64_t(c) * unit + i] = q[r][c + i] * scale;
    for (int i = 0; c + i < dim; i++) y[int64_t(c) * unit + i] = q[r][c + i] * scale;
  }
}

// Computes scores[key][row] of kKeys keys and one group of rows.
template <int D>
inline void score(const float* keys, int64_t pitch, const float* q, int dim, float* scores,
                  int64_t scores_pitch, Ahead& ahead) {
  vf a[2 * kKeys<D>];
  for (int p = 0; p < kKeys<D>; p++) a[2 * p] = a[2 * p + 1] = vf{};
  for (int c0 = 0; c0 < dim; c0 += kStrip) {
    ahead.next();
    for (int c = c0; c < c0 + kStrip; c += D, q += 2 * kLanes) {
      const vf q0 = load(q), q1 = load(q + kLanes);
      for (int p = 0; p < kKeys<D>; p++) {
        const vf k = repeat<D>(keys + p * pitch + c);
        a[2 * p] += k * q0;
        a[2 * p + 1] += k * q1;
      }
    }
  }
  if constexpr (D == 1) {
    for (int p = 0; p < kKeys<D>; p++) {
      store(scores + p * scores_pitch, a[2 * p]);
      store(scores + p * scores_pitch + kLanes, a[2 * p + 1]);
    }
  } else {
    add_groups<D, 2 * kKeys<D>>(a);
    for (int i = 0; i < 2 * kKeys<D> / D; i++) store(scores + i * kLanes, a[i]);
  }
}

// ---- values -------------------------------------------------------------------------------------

// acc[r] = keep[r] acc[r] + sum over n keys of weight[key][r] values[key], for R rows, N vectors.
template <int R, int N>
inline void accumulate(const float* weight, int64_t weight_pitch, const float* values, int n,
                       const float* keep, float* acc, int64_t pitch, Ahead& ahead) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) a[r][j] = load(acc + r * pitch + j * kLanes) * keep[r];
  for (int p0 = 0; p0 < n; p0 += kBetween) {
    ahead.next();
    for (int p = p0; p < (n < p0 + kBetween ? n : p0 + kBetween); p++) {
      vf v[N];
      for (int j = 0; j < N; j++) v[j] = load(values + p * kStrip + j * kLanes);
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) a[r][j] += v[j] * weight[p * weight_pitch + r];
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) store(acc + r * pitch + j * kLanes, a[r][j]);
}

// Calls f<R>(first row) for tiles of R rows, which need 2 R sums in registers. 8 rows run as 4 + 4.
template <class F> inline void each_row_tile(int rows, F f) {
  constexpr int R = kLanes == 16 ? 8 : 6;
  int r = 0;
  for (; rows - r >= R && (R == 8 || rows - r != 8); r += R) f.template operator()<R>(r);
  for (; rows - r >= 4; r += 4) f.template operator()<4>(r);
  for (; rows - r >= 1; r++) f.template operator()<1>(r);
}

inline int row_tiles(int rows) {
  int n = 0;
  each_row_tile(rows, [&n]<int>(int) { n++; });
  return n;
}

// ---- the tile -----------------------------------------------------------------------------------

struct Work {
  float *q, *keys, *scores, *strip, *acc;
  float *max, *sum, *keep;  // one number per row, in the order of the scores' lanes
  int32_t* last;            // per row: the last position that it sees, counted from pos0

  explicit Work(const AttentionTile& t) {
    float* p = t.work + (64 - reinterpret_cast<uintptr_t>(t.work) % 64) % 64 / 4;
    const auto take = [&p](int64_t n) { return p += n, p - n; };
    const int dim = whole_strips(t.head_dim);
    q = take(int64_t(dim) * kQueryRows);
    keys = take(int64_t(dim) * kMaxKeys);
    scores = take((kKeyBlock + kMaxKeys) * kQueryRows);
    strip = take(kKeyBlock * kStrip);
    acc = take(kQueryRows * kStrip);
    max = take(kQueryRows);
    sum = take(kQueryRows);
    keep = take(kQueryRows);
    last = reinterpret_cast<int32_t*>(take(kQueryRows));
  }
};
static_assert(kQueryRows % 32 == 0);  // rows are padded to two vectors of the widest set

// Sets every lane to the largest of the lanes at a multiple of `period` from it.
inline vf max_over_period(vf v, int period) {
  for (int h = kLanes / 2; h >= period; h /= 2) {
    float twice[2 * kLanes];
    store(twice, v);
    store(twice + kLanes, v);
    v = vmax(load(twice + h), v);
  }
  return v;
}

// The softmax of one block for one vector of rows. The scores are `steps` vectors, `pitch` apart,
// and become weights e^(score - max). key: the position of each lane's first key, counted from
// pos0.
inline void soften(float* scores, int64_t pitch, int steps, int across, int period, bool masked,
                   vi key, const Work& w, int at) {
  const vf none = splat(-INFINITY), before = load(w.max + at);
  vf top = before;
  if (masked) {
    vi last;
    memcpy(&last, w.last + at, sizeof last);
    for (int i = 0; i < steps; i++, key += across) {
      const vf x = key > last ? none : load(scores + i * pitch);
      store(scores + i * pitch, x);
      top = vmax(x, top);
    }
  } else {
    for (int i = 0; i < steps; i++) top = vmax(load(scores + i * pitch), top);
  }
  top = max_over_period(top, period);
  const vf base = top == none ? vf{} : top;  // no key seen yet: all weights are 0
  vf total = vf{};
  for (int i = 0; i < steps; i++) {
    const vf raw = load(scores + i * pitch), e = vexp(raw - base);
    const vf x = raw == none ? vf{} : e;  // NaN stays NaN
    store(scores + i * pitch, x);
    total += x;
  }
  const vf shrink = vexp(before - base), keep = before == none ? vf{} : shrink;
  store(w.keep + at, keep);
  store(w.max + at, top);
  store(w.sum + at, load(w.sum + at) * keep + total);
}

// Online softmax (https://arxiv.org/abs/1805.02867): the result so far is acc / sum, with weights
// e^(score - max).
template <int D> void attention_rows(const AttentionTile& t, int rows) {
  constexpr int unit = 2 * kLanes / D;            // rows of a group
  constexpr int across = D > 2 ? D / 2 : 1;       // keys in a vector of scores
  const int vectors = D > 2 ? 1 : rows / kLanes;  // of scores, for `across` keys
  const int dim = t.head_dim, padded_dim = whole_strips(dim);
  const Source keys{t.k, t.k_row, dim}, values{t.v, t.v_row, dim};
  const Work w(t);
  const auto block_end = [&](int64_t p) { return t.end - p < kKeyBlock ? t.end : p + kKeyBlock; };

  Ahead(keys, t.begin, block_end(t.begin), 1).next();
  pack_queries<D>(t.q, t.n_rows, dim, padded_dim, rows, t.scale, w.q);
  for (int i = 0; i < vectors * kLanes; i++) {
    w.max[i] = -INFINITY;
    w.sum[i] = 0;
    w.last[i] = i % rows / t.group;
  }
  memset(t.acc, 0, size_t(t.n_rows) * size_t(dim) * 4);
  vi lane_key;
  for (int i = 0; i < kLanes; i++) lane_key[i] = i / (kLanes / across);

  for (int64_t p0 = t.begin; p0 < t.end; p0 += kKeyBlock) {
    const int n = int(block_end(p0) - p0), groups = (n + kKeys<D> - 1) / kKeys<D>;
    Ahead next_values(values, p0, p0 + n, int64_t(groups) * (rows / unit) * (padded_dim / kStrip));
    for (int p = 0; p < n; p += kKeys<D>) {
      decode_rows(t.k_type, keys, p0 + p, n - p < kKeys<D> ? n - p : kKeys<D>, 0, padded_dim,
                  w.keys, padded_dim);
      for (int r = 0; r < rows; r += unit)
        score<D>(w.keys, padded_dim, w.q + int64_t(r) * padded_dim, padded_dim,
                 w.scores + p * rows + r, rows, next_values);
    }

    const int steps = (n + across - 1) / across;
    for (int i = n * rows; i < steps * across * rows; i++) w.scores[i] = -INFINITY;
    for (int v = 0; v < vectors * kLanes; v += kLanes)
      soften(w.scores + v, int64_t(vectors) * kLanes, steps, across, D > 2 ? rows : kLanes,
             p0 + n - 1 > t.pos0, lane_key + int32_t(p0 - t.pos0), w, v);

    const int64_t tiles = int64_t(padded_dim / (2 * kLanes)) * row_tiles(t.n_rows);
    Ahead next_keys(keys, p0 + n, block_end(p0 + n), tiles * ((n + kBetween - 1) / kBetween));
    for (int c = 0; c < dim; c += kStrip) {
      decode_rows(t.v_type, values, p0, n, c, kStrip, w.strip, kStrip);
      const int columns = dim - c < kStrip ? dim - c : kStrip;
      const bool whole = columns == kStrip;
      float* acc = whole ? t.acc + c : w.acc;
      const int64_t pitch = whole ? dim : kStrip;
      for (int r = 0; !whole && r < t.n_rows; r++)
        memcpy(acc + r * pitch, t.acc + int64_t(r) * dim + c, size_t(columns) * 4);
      for (int j = 0; j < kStrip; j += 2 * kLanes)
        each_row_tile(t.n_rows, [&]<int R>(int r) {
          accumulate<R, 2>(w.scores + r, rows, w.strip + j, n, w.keep + r, acc + r * pitch + j,
                           pitch, next_keys);
        });
      for (int r = 0; !whole && r < t.n_rows; r++)
        memcpy(t.acc + int64_t(r) * dim + c, acc + r * pitch, size_t(columns) * 4);
    }
  }

  for (int r = 0; r < t.n_rows; r++) {
    t.max[r] = w.max[r];
    t.sum[r] = 0;
    for (int i = 0; i < across; i++) t.sum[r] += w.sum[r + i * rows];
  }
}

}  // namespace

namespace DESKSIDE_ISA {

void store_kv(const float* x, int n, Type type, uint8_t* dst) {
  if (type == Type::F32) {
    memcpy(dst, x, size_t(n) * 4);
  } else if (type == Type::F16) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store_f16(dst + 2 * i, x + i);
    for (; i < n; i++) {
      const uint16_t h = float_to_f16(x[i]);
      memcpy(dst + 2 * i, &h, 2);
    }
  } else {
    for (int b = 0; b < n / 32; b++) store_q8_0(dst + sizeof(BlockQ8_0) * size_t(b), x + 32 * b);
  }
}

void attention(const AttentionTile& t) {
  int d = kLanes;
  while (d > 1 && 2 * kLanes / d < t.n_rows) d /= 2;
  const int unit = 2 * kLanes / d, rows = (t.n_rows + unit - 1) / unit * unit;
  switch (d) {
    case 1: return attention_rows<1>(t, rows);
    case 2: return attention_rows<2>(t, rows);
    case 4: return attention_rows<4>(t, rows);
#if defined(__AVX2__)
    case 8: return attention_rows<8>(t, rows);
#endif
#if defined(DESKSIDE_AVX512)
    case 16: return attention_rows<16>(t, rows);
#endif
  }
}

}  // namespace DESKSIDE_ISA
}  // namespace deskside
