// The gated delta rule (docs/MODEL.md), C tokens at a time. Compiled once per instruction set.
//
// With decay d_i = e^g_i, the rule for token i of a block is
//   S_i = d_i S_(i-1) + k_i delta_i^T,  delta_i = beta_i (v_i - d_i S_(i-1)^T k_i),
//   o_i = S_i^T q_i.
// Let D(j, i) = d_(j+1) .. d_i. Its factors are <= 1, so it can only underflow. Unrolled from the
// state S before the block,
//   S_i = D(0, i) S + sum_(j <= i) D(j, i) k_j delta_j^T,
// and with p_i = S^T k_i, r_i = S^T q_i
//   delta_i = beta_i (v_i - D(0, i) p_i - sum_(j <  i) D(j, i) (k_i . k_j) delta_j)
//   o_i     =               D(0, i) r_i + sum_(j <= i) D(j, i) (q_i . k_j) delta_j.
// So the state is read twice per block: for all p and r, and to become S_C. That is 3 C + 1
// operations per element instead of 4 C, with one load and store per block. Value columns are
// independent of each other.
#include "reduce.h"
#include "sequence_entry.h"

namespace deskside {
namespace {

// The sums must fit into registers beside their operands. 6 tokens x 2 vectors of columns are 12
// sums, enough to hide the latency of additions.
constexpr int kSums = kLanes == 16 ? 24 : 12;
constexpr int kBlock = 6;       // tokens
constexpr int kColumns = 64;    // columns computed together: half a head, 32 KiB
constexpr int kBatch = 8;       // blocks whose coefficients are computed together
constexpr int kRowsAhead = 16;  // rows of the state between a prefetch and its use

// V is a vector of floats, or a float for columns that fill no vector. As a template argument, a
// vector type loses its attributes. So these functions copy instead of dereferencing.
template <class V> inline V load_as(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store_as(float* p, V v) { memcpy(p, &v, sizeof v); }

// ---- coefficients of a block, the same for every column ----------------------------------------

struct Coefficients {
  float beta[kBlock];
  float from_start[kBlock];  // D(0, i)
  float to_end[kBlock];      // D(i, C)
  float kk[kBlock][kBlock];  // beta_i D(j, i) (k_i . k_j), j < i
  float qk[kBlock][kBlock];  // D(j, i) (q_i . k_j), j <= i
};

// The order of a block's C^2 dot products: (k_i, k_j) for j < i, then (q_i, k_j) for j <= i.
struct Pair {
  bool of_q;
  int i, j;
};
constexpr Pair pair_at(int c, int e) {
  for (int of_q = 0; of_q < 2; of_q++)
    for (int i = 0; i < c; i++)
      for (int j = 0; j < i + of_q; j++)
        if (e-- == 0) return {of_q == 1, i, j};
  return {true, 0, 0};  // padding
}

template <int C, int E> inline void add_product(vf& sum, const vf* q, const vf* k) {
  if constexpr (E < C * C) {
    constexpr Pair p = pair_at(C, E);
    sum += (p.of_q ? q : k)[p.i] * k[p.j];
  }
}

// Dot products E + I for every lane I. Their horizontal sums share shuffles.
template <int C, int E, int... I>
inline void dots_from(const float* q, const float* k, int64_t stride, int dim, float* dots,
                      Ints<I...> all) {
  vf a[kLanes] = {};
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    vf qv[C], kv[C];
    for (int i = 0; i < C; i++) qv[i] = load(q + i * stride + c), kv[i] = load(k + i * stride + c);
    (add_product<C, E + I>(a[I], qv, kv), ...);
  }
  if (c < dim) {
    float rest[2][C][kLanes] = {};
    vf qv[C], kv[C];
    for (int i = 0; i < C; i++) {
      memcpy(rest[0][i], q + i * stride + c, size_t(dim - c) * 4);
      memcpy(rest[1][i], k + i * stride + c, size_t(dim - c) * 4);
      qv[i] = load(rest[0][i]), kv[i] = load(rest[1][i]);
    }
    (add_product<C, E + I>(a[I], qv, kv), ...);
  }
  add_groups<kLanes, kLanes>(a);
  store(dots + E, a[0]);
  if constexpr (E + kLanes < C * C) dots_from<C, E + kLanes>(q, k, stride, dim, dots, all);
}

template <int C> inline Coefficients coefficients(const DeltaSlice& s, int t) {
  float dots[C * C + kLanes];
  dots_from<C, 0>(s.q + t * s.stride, s.k + t * s.stride, s.stride, s.dim, dots, Lanes{});
  Coefficients x;
  float decay[C];
  for (int i = 0; i < C; i++) {
    decay[i] = s.decay[(t + i) * s.gate_stride];
    x.beta[i] = s.beta[(t + i) * s.gate_stride];
  }
  float d = 1;
  for (int i = 0; i < C; i++) x.from_start[i] = d *= decay[i];
  d = 1;
  for (int i = C - 1; i >= 0; i--) x.to_end[i] = d, d *= decay[i];
  const float* dot = dots;
  for (int i = 0; i < C; i++) {
    d = x.beta[i];
    const float* row = dot;
    for (int j = i - 1; j >= 0; j--) x.kk[i][j] = (d *= decay[j + 1]) * row[j];
    dot += i;
  }
  for (int i = 0; i < C; i++) {
    d = 1;
    x.qk[i][i] = dot[i];
    for (int j = i - 1; j >= 0; j--) x.qk[i][j] = (d *= decay[j + 1]) * dot[j];
    dot += i + 1;
  }
  return x;
}

// ---- columns ------------------------------------------------------------------------------------

// sums[x][i] = S^T (row i of matrix x), for X matrices of C rows and N vectors of the state's
// columns from `at` on. Rows are `stride` floats apart.
template <class V, int N, int C, int X>
inline void project(const float* at, int dim, const float* (&&x)[X], int64_t stride,
                    float* (&&sums)[X]) {
  constexpr int lanes = int(sizeof(V) / 4);
  V a[X][C][N];
  for (int m = 0; m < X; m++)
    for (int i = 0; i < C; i++)
      for (int j = 0; j < N; j++) a[m][i][j] = V{};
  for (int row = 0; row < dim; row++, at += dim) {
    if constexpr (C == 1)  // the state is then read once per token, from memory: prefetch it
      for (int j = 0; j < N * lanes; j += 16)
        __builtin_prefetch(at + kRowsAhead * int64_t(dim) + j);
    V v[N];
    for (int j = 0; j < N; j++) v[j] = load_as<V>(at + j * lanes);
    for (int m = 0; m < X; m++)
      for (int i = 0; i < C; i++)
        for (int j = 0; j < N; j++) a[m][i][j] += v[j] * x[m][i * stride + row];
  }
  for (int m = 0; m < X; m++)
    for (int i = 0; i < C; i++)
      for (int j = 0; j < N; j++) store_as(sums[m] + i * kColumns + j * lanes, a[m][i][j]);
}

// In: p and r of one vector of columns. Out: o, and in p each token's delta times D(i, C).
template <class V, int C>
inline void solve(const Coefficients& x, const float* v, int64_t stride, float* p, const float* r,
                  float* out, int64_t out_stride) {
  V delta[C];
  for (int i = 0; i < C; i++) {
    const V fresh = load_as<V>(v + i * stride) - load_as<V>(p + i * kColumns) * x.from_start[i];
    delta[i] = fresh * x.beta[i];
    for (int j = 0; j < i; j++) delta[i] -= delta[j] * x.kk[i][j];
  }
  for (int i = 0; i < C; i++) {
    V o = load_as<V>(r + i * kColumns) * x.from_start[i];
    for (int j = 0; j <= i; j++) o += delta[j] * x.qk[i][j];
    store_as(out + i * out_stride, o);
    store_as(p + i * kColumns, delta[i] * x.to_end[i]);
  }
}

// S <- decay S + the sum of k_i delta_i^T.
template <class V, int N, int C>
inline void update(float* at, int dim, const float* k, int64_t stride, float decay,
                   const float* delta) {
  constexpr int lanes = int(sizeof(V) / 4);
  V d[C][N];
  for (int i = 0; i < C; i++)
    for (int j = 0; j < N; j++) d[i][j] = load_as<V>(delta + i * kColumns + j * lanes);
  for (int row = 0; row < dim; row++, at += dim, k++) {
    V v[N];
    for (int j = 0; j < N; j++) v[j] = load_as<V>(at + j * lanes) * decay;
    for (int i = 0; i < C; i++)
      for (int j = 0; j < N; j++) v[j] += d[i][j] * k[i * stride];
    for (int j = 0; j < N; j++) store_as(at + j * lanes, v[j]);
  }
}

// Calls f<V, N>(column) for groups of columns.
template <int N, class F> inline void each_group(int columns, F f) {
  int c = 0;
  for (; c + N * kLanes <= columns; c += N * kLanes) f.template operator()<vf, N>(c);
  for (; c + kLanes <= columns; c += kLanes) f.template operator()<vf, 1>(c);
  for (; c < columns; c++) f.template operator()<float, 1>(c);
}

template <int C> inline void delta_block(const DeltaSlice& s, int t, const Coefficients& x) {
  constexpr int N = C == 1 ? 4 : 2;
  const float *q = s.q + t * s.stride, *k = s.k + t * s.stride;
  for (int c0 = s.c0; c0 < s.c1; c0 += kColumns) {
    const int columns = s.c1 - c0 < kColumns ? s.c1 - c0 : kColumns;
    float *state = s.state + c0, *out = s.out + t * s.out_stride + c0;
    const float* v = s.v + t * s.stride + c0;
    alignas(64) float p[C * kColumns], r[C * kColumns];
    each_group<N>(columns, [&]<class V, int M>(int c) {
      if constexpr (2 * C * N <= kSums) {
        project<V, M, C, 2>(state + c, s.dim, {k, q}, s.stride, {p + c, r + c});
      } else {
        project<V, M, C, 1>(state + c, s.dim, {k}, s.stride, {p + c});
        project<V, M, C, 1>(state + c, s.dim, {q}, s.stride, {r + c});
      }
    });
    each_group<1>(columns, [&]<class V, int>(int c) {
      solve<V, C>(x, v + c, s.stride, p + c, r + c, out + c, s.out_stride);
    });
    each_group<N>(columns, [&]<class V, int M>(int c) {
      update<V, M, C>(state + c, s.dim, k, s.stride, x.from_start[C - 1], p + c);
    });
  }
}

// Rows of different tokens are pages apart, so the hardware does not prefetch them.
inline void prefetch_row(const float* p, int n) {
  for (int c = 0; c < n; c += 16) __builtin_prefetch(p + c, 0, 2);
}
inline void prefetch_keys(const DeltaSlice& s, int t, int n) {
  for (int end = t + n < s.n ? t + n : s.n; t < end; t++) {
    prefetch_row(s.q + t * s.stride, s.dim);
    prefetch_row(s.k + t * s.stride, s.dim);
  }
}
inline void prefetch_values(const DeltaSlice& s, int t, int n) {
  for (int end = t + n < s.n ? t + n : s.n; t < end; t++) {
    prefetch_row(s.v + t * s.stride + s.c0, s.c1 - s.c0);
    prefetch_row(s.out + t * s.out_stride + s.c0, s.c1 - s.c0);
  }
}

template <int C> void last_block(const DeltaSlice& s, int t) {
  delta_block<C>(s, t, coefficients<C>(s, t));
}

}  // namespace

namespace DESKSIDE_ISA {

void gated_delta(const DeltaSlice& s) {
  int t = 0;
  if (s.n > 1) prefetch_keys(s, 0, kBatch * kBlock);
  while (s.n - t >= kBlock) {
    // Coefficients end in chains of scalar operations. The chains of several blocks overlap.
    Coefficients x[kBatch];
    const int blocks = (s.n - t) / kBlock < kBatch ? (s.n - t) / kBlock : kBatch;
    for (int b = 0; b < blocks; b++) x[b] = coefficients<kBlock>(s, t + b * kBlock);
    for (int b = 0; b < blocks; b++, t += kBlock) {
      prefetch_keys(s, t + kBatch * kBlock, kBlock);
      prefetch_values(s, t + kBlock, kBlock);
      delta_block<kBlock>(s, t, x[b]);
    }
  }
  switch (s.n - t) {
    case 5: return last_block<5>(s, t);
    case 4: return last_block<4>(s, t);
    case 3: return last_block<3>(s, t);
    case 2: return last_block<2>(s, t);
    case 1: return last_block<1>(s, t);
  }
}

}  // namespace DESKSIDE_ISA
}  // namespace deskside
