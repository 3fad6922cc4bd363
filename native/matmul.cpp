// Matrix products on packed weights. Compiled once per instruction set (DESKSIDE_ISA).
//
// Quantised weights meet activations rounded to 8 bits per block of 32; products are summed exactly
// in integers within a block and in float32 over blocks, in the order of the row. Float weights meet
// float activations.
//
// Few rows of x (m <= kMaxDirect): blocks are unpacked in registers, so the weights stream. More: a
// panel is unpacked once to the tile and used by all rows of x.
#include "matmul_entry.h"
#include "unpack.h"

namespace deskside {
namespace {

// Rows of x, and of panels, that are multiplied together from the tile: a sum of integers and one of
// floats for each of their pairs must stay in registers. More panels mean fewer loads of x.
#if defined(DESKSIDE_AVX512)
constexpr int kTogether = 2, kRowsOfX = 6, kMaxDirect = 8;
#else
constexpr int kTogether = 1, kRowsOfX = 4, kMaxDirect = 4;
#endif
// Bytes ahead of the block at hand that are fetched to L2, for the hardware's prefetcher stops at the
// end of a 4 KiB page, and to L1. L1 from 3 KiB ahead costs a sixth of the speed (docs/LOG.md).
constexpr int64_t kFar = 3072, kNear = 1024;

// Fetches `bytes` at p, of a stream that ends at `end` and goes on `jump` bytes behind it.
template <int Locality>
inline void fetch(const uint8_t* p, int bytes, const uint8_t* end, int64_t jump) {
  if (p >= end) p += jump;
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + line, 0, Locality);
}

// A record of activations (kernels.h). All rows of x share the offsets of its parts, so that a row
// costs one register.
struct Parts {
  int64_t d, s, c32, c16;
  explicit Parts(int64_t cols)
      : d(cols), s(d + cols / 32 * 4), c32(s + cols / 32 * 4), c16(c32 + cols / 32 * 4) {}
};

inline float float_at(const uint8_t* p, int64_t at) {
  float f;
  std::memcpy(&f, p + at, 4);
  return f;
}

inline const uint8_t* record(const Rows& x, const int32_t* index, int i) {
  return x.q + (index ? index[i] : i) * record_bytes(x.cols);
}

// Sums of products of kLanes rows over the groups [first, end) of a block, for M rows of x.
template <int M>
inline void dot_groups(const Bytes* w, int first, int end, const uint8_t* const* x, int64_t correction,
                       int64_t block, vf* sums) {
  Bytes sum[M];
  for (int i = 0; i < M; i++) sum[i] = kBias == 0 ? Bytes{} : splat_lane(x[i] + correction);
  for (int g = first; g < end; g++) {
    const Bytes abs = magnitude(w[g]);
    for (int i = 0; i < M; i++)
      sum[i] = dot4(sum[i], w[g], abs, splat_lane(x[i] + 32 * block + 4 * g));
  }
  for (int i = 0; i < M; i++) sums[i] = to_float(sum[i]);
}

// One block of 32 weights of kLanes rows against M rows of x.
template <bool HasMin, bool Halves, int M>
inline void dot_block(const Bytes* w, const vf* scale, vf min, const uint8_t* const* x,
                      const Parts& parts, int64_t b, vf* acc) {
  vf sums[M], second[M];
  if constexpr (Halves) {
    dot_groups<M>(w, 0, 4, x, parts.c16 + 8 * b, b, sums);
    dot_groups<M>(w, 4, 8, x, parts.c16 + 8 * b + 4, b, second);
  } else {
    dot_groups<M>(w, 0, 8, x, parts.c32 + 4 * b, b, sums);
  }
  for (int i = 0; i < M; i++) {
    vf product = sums[i] * scale[0];
    if constexpr (Halves) product += second[i] * scale[1];
    acc[i] += product * float_at(x[i], parts.d + 4 * b);
    if constexpr (HasMin) acc[i] -= min * float_at(x[i], parts.s + 4 * b);
  }
}

// The rows of a panel that exist: the last panel may have fewer than 16.
inline void store_rows(float* y, int part, int valid, vf v) {
  const int first = part * kLanes;
  if (first + kLanes <= valid) {
    store(y + first, v);
    return;
  }
  for (int i = 0; first + i < valid; i++) y[first + i] = v[i];
}

template <Type T, int M>
void dot_direct(const uint8_t* panel, int64_t cols, const uint8_t* const* x, float* y, int64_t ldy,
                int valid, const uint8_t* next) {
  using P = Panel<T>;
  const Parts parts(cols);
  vf acc[kParts][M];
  for (int part = 0; part < kParts; part++)
    for (int i = 0; i < M; i++) acc[part][i] = vf{};
  const uint8_t* s = panel + P::header * kPanelRows;
  constexpr int bytes = P::bytes / P::blocks;  // of a block
  const uint8_t* const end = s + cols / 32 * bytes;
  const int64_t jump = next - end;
  for (int64_t b = 0; b < cols / 32; s += P::bytes) {
    for (int j = 0; j < P::blocks; j++, b++) {
      fetch<2>(s + j * bytes + kFar, bytes, end, jump);
      fetch<3>(s + j * bytes + kNear, bytes, end, jump);
      for (int part = 0; part < kParts; part++) {
        Bytes w[8];
        vf scale[2], min = vf{};
        unpack<T>(s, panel, j, part, w, scale, min);
        dot_block<P::has_min, P::halves, M>(w, scale, min, x, parts, b, acc[part]);
      }
    }
  }
  for (int part = 0; part < kParts; part++)
    for (int i = 0; i < M; i++) store_rows(y + i * ldy, part, valid, acc[part][i]);
}

// gcc 12.2 clones this function for a constant argument and loses its body: hence noipa
// (tests/test_kernels.py would find it).
#if defined(__GNUC__) && !defined(__clang__)
#define DESKSIDE_NO_CLONE __attribute__((noipa))
#else
#define DESKSIDE_NO_CLONE
#endif
template <Type T> DESKSIDE_NO_CLONE void unpack_panel(const uint8_t* panel, int64_t cols, Tile::Unpacked t) {
  using P = Panel<T>;
  constexpr int per = P::halves ? 2 : 1;
  const uint8_t* s = panel + P::header * kPanelRows;
  for (int64_t b = 0; b < cols / 32; s += P::bytes) {
    for (int j = 0; j < P::blocks; j++, b++) {
      for (int part = 0; part < kParts; part++) {
        Bytes w[8];
        vf scale[2], min = vf{};
        unpack<T>(s, panel, j, part, w, scale, min);
        for (int g = 0; g < 8; g++)
          store_bytes(t.w + (b * 8 + g) * kVector + part * 4 * kLanes, w[g]);
        for (int h = 0; h < per; h++)
          store(t.scale + (b * per + h) * kPanelRows + part * kLanes, scale[h]);
        if constexpr (P::has_min) store(t.min + b * kPanelRows + part * kLanes, min);
      }
    }
  }
}

// R unpacked panels against M rows of x; y[j] is panel j's place in the results. Meanwhile fetches
// `ahead` bytes a block of what lies at `next`: the panels to be unpacked next.
template <bool HasMin, bool Halves, int R, int M>
void dot_tile(const Tile& t, int64_t cols, const uint8_t* const* x, float* const* y, int64_t ldy,
              const int* valid, const uint8_t* next, int ahead) {
  constexpr int per = Halves ? 2 : 1;
  const Parts parts(cols);
  for (int part = 0; part < kParts; part++) {
    vf acc[R][M];
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) acc[j][i] = vf{};
    for (int64_t b = 0; b < cols / 32; b++) {
      for (int line = 0; line < ahead; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += ahead;
      vf sums[per][R][M];
      for (int h = 0; h < per; h++) {
        Bytes sum[R][M];
        const int64_t c = Halves ? parts.c16 + 8 * b + 4 * h : parts.c32 + 4 * b;
        for (int i = 0; i < M; i++)
          for (int j = 0; j < R; j++) sum[j][i] = kBias == 0 ? Bytes{} : splat_lane(x[i] + c);
        for (int g = 8 / per * h; g < 8 / per * (h + 1); g++) {
          Bytes w[R], abs[R];
          for (int j = 0; j < R; j++) {
            const auto* from = reinterpret_cast<const uint8_t*>(t.panel[j].w);
            w[j] = vector_at(from + (b * 8 + g) * kVector, part);
            abs[j] = magnitude(w[j]);
          }
          for (int i = 0; i < M; i++) {
            const Bytes xi = splat_lane(x[i] + 32 * b + 4 * g);
            for (int j = 0; j < R; j++) sum[j][i] = dot4(sum[j][i], w[j], abs[j], xi);
          }
        }
        for (int j = 0; j < R; j++)
          for (int i = 0; i < M; i++) sums[h][j][i] = to_float(sum[j][i]);
      }
      for (int j = 0; j < R; j++) {
        const Tile::Unpacked& p = t.panel[j];
        for (int h = 0; h < per; h++) {
          const vf scale = load(p.scale + (b * per + h) * kPanelRows + part * kLanes);
          for (int i = 0; i < M; i++) sums[h][j][i] *= scale;
        }
        for (int i = 0; i < M; i++) {
          vf product = sums[0][j][i];
          if constexpr (Halves) product += sums[per - 1][j][i];
          acc[j][i] += product * float_at(x[i], parts.d + 4 * b);
        }
        if constexpr (HasMin) {
          const vf min = load(p.min + b * kPanelRows + part * kLanes);
          for (int i = 0; i < M; i++) acc[j][i] -= min * float_at(x[i], parts.s + 4 * b);
        }
      }
    }
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) store_rows(y[j] + i * ldy, part, valid[j], acc[j][i]);
  }
}

// Calls f<M>() for a run-time m in 1..Max.
template <int Max, class F> inline void with_rows(int m, F&& f) {
  if constexpr (Max > 1) {
    if (m < Max) return with_rows<Max - 1>(m, f);
  }
  f.template operator()<Max>();
}

// Panels of one type, one after another in memory, and where their rows' results go.
struct Panels {
  int n;
  const uint8_t* data[2];
  float* y[2];
  int valid[2];
};

inline void add_panel(Panels& p, const Weights& w, int64_t panel, float* y) {
  const int64_t row = panel * kPanelRows, left = w.rows - row;
  p.data[p.n] = w.data + panel * w.stride;
  p.y[p.n] = y + row;
  p.valid[p.n++] = int(left < kPanelRows ? left : kPanelRows);
}

// `then`: what is read next, null for what lies behind the last panel.
template <Type T>
void multiply(const Panels& p, int64_t cols, const Rows& x, const int32_t* index, int m,
              int64_t ldy, const Tile& tile, const uint8_t* then) {
  using P = Panel<T>;
  constexpr int per_block = P::bytes / P::blocks;
  const int64_t bytes = P::header * kPanelRows + cols / 32 * per_block;
  if (m <= kMaxDirect) {
    const uint8_t* a[kMaxDirect];
    for (int i = 0; i < m; i++) a[i] = record(x, index, i);
    for (int j = 0; j < p.n; j++) {
      const uint8_t* end = p.data[j] + bytes;
      const uint8_t* next = j + 1 < p.n ? p.data[j + 1] : then ? then : end;
      with_rows<kMaxDirect>(m, [&]<int M>() {
        dot_direct<T, M>(p.data[j], cols, a, p.y[j], ldy, p.valid[j], next);
      });
    }
    return;
  }
  for (int j = 0; j < p.n; j++) unpack_panel<T>(p.data[j], cols, tile.panel[j]);
  const uint8_t* next = then ? then : p.data[p.n - 1] + bytes;
  for (int i = 0; i < m; i += kRowsOfX) {
    const uint8_t* a[kRowsOfX];
    const int n = m - i < kRowsOfX ? m - i : kRowsOfX;
    for (int k = 0; k < n; k++) a[k] = record(x, index, i + k);
    float* const y[2] = {p.y[0] + i * ldy, p.n > 1 ? p.y[1] + i * ldy : nullptr};
    const int ahead = i == 0 ? p.n * per_block / kParts : 0;
    with_rows<kRowsOfX>(n, [&]<int M>() {
      if constexpr (kTogether == 2) {
        if (p.n == 2)
          return dot_tile<P::has_min, P::halves, 2, M>(tile, cols, a, y, ldy, p.valid, next, ahead);
      }
      dot_tile<P::has_min, P::halves, 1, M>(tile, cols, a, y, ldy, p.valid, next, ahead);
    });
  }
}

template <Type T>
void matmul_quantised(const Weights& w, int64_t p0, int64_t p1, const Rows& x, const int32_t* index,
                      int m, float* y, int64_t ldy, const Tile& tile, const uint8_t* then) {
  for (int64_t p = p0; p < p1; p += kTogether) {
    Panels panels{};
    for (int64_t q = p; q < p1 && q < p + kTogether; q++) add_panel(panels, w, q, y);
    multiply<T>(panels, w.cols, x, index, m, ldy, tile, p + kTogether < p1 ? nullptr : then);
  }
}

template <Type T>
void pair_quantised(const Weights& w, const Weights& v, int64_t p0, int64_t p1, const Rows& x,
                    const int32_t* index, int m, float* y, float* z, int64_t ldy, const Tile& tile) {
  for (int64_t p = p0; p < p1; p++) {
    Panels panels{};
    add_panel(panels, w, p, y);
    if constexpr (kTogether == 1) {
      multiply<T>(panels, w.cols, x, index, m, ldy, tile, nullptr);
      panels.n = 0;
    }
    add_panel(panels, v, p, z);
    multiply<T>(panels, w.cols, x, index, m, ldy, tile, nullptr);
  }
}

// ---- float weights ------------------------------------------------------------------------------

void to_floats(const uint8_t* row, Type type, int64_t n, float* y) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i));
    const __m256 f = type == Type::F16
                         ? _mm256_cvtph_ps(h)
                         : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    _mm256_storeu_ps(y + i, f);
  }
#endif
  for (; i < n; i++) {
    uint16_t h;
    std::memcpy(&h, row + 2 * i, 2);
    y[i] = type == Type::F16 ? f16_to_float(h) : bf16_to_float(h);
  }
}

// R rows of w against M rows of x.
template <int R, int M>
void dot_float(const float* const* w, int64_t cols, const float* const* x, float* y, int64_t ldy) {
  vf acc[R][M];
  float tail[R][M];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) acc[j][i] = vf{}, tail[j][i] = 0;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    for (int j = 0; j < R && M == 1; j++) __builtin_prefetch(w[j] + c + kNear / 4);
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) acc[j][i] += load(w[j] + c) * load(x[i] + c);
  }
  for (; c < cols; c++)
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) tail[j][i] += w[j][c] * x[i][c];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) y[i * ldy + j] = sum(acc[j][i]) + tail[j][i];
}

void matmul_float(const Weights& w, int64_t p0, int64_t p1, const Rows& x, const int32_t* index,
                  int m, float* y, int64_t ldy, const Tile& tile, const uint8_t*) {
  constexpr int kFloatX = kLanes == 16 ? 4 : 2;  // R * M sums and R or M operands are in registers
  const int64_t row_bytes = w.cols * (w.type == Type::F32 ? 4 : 2);
  const int64_t end = p1 * kPanelRows < w.rows ? p1 * kPanelRows : w.rows;
  static_assert(kPanelRows % kFloatRows == 0);
  for (int64_t r = p0 * kPanelRows; r < end; r += kFloatRows) {
    const int rows = int(end - r < kFloatRows ? end - r : kFloatRows);
    const uint8_t* first = w.data + r / kPanelRows * w.stride + r % kPanelRows * row_bytes;
    const float* row[kFloatRows];
    for (int j = 0; j < rows; j++) {
      const uint8_t* raw = first + j * row_bytes;
      row[j] = w.type == Type::F32 ? reinterpret_cast<const float*>(raw) : tile.f + j * w.cols;
      if (w.type != Type::F32) to_floats(raw, w.type, w.cols, tile.f + j * w.cols);
    }
    for (int i = 0; i < m; i += kFloatX) {
      const int n = m - i < kFloatX ? m - i : kFloatX;
      const float* a[kFloatX];
      for (int k = 0; k < n; k++) a[k] = x.f + (index ? index[i + k] : i + k) * x.stride;
      float* out = y + int64_t(i) * ldy + r;
      with_rows<kFloatX>(n, [&]<int M>() {
        if (rows == kFloatRows) return dot_float<kFloatRows, M>(row, w.cols, a, out, ldy);
        for (int j = 0; j < rows; j++) dot_float<1, M>(row + j, w.cols, a, out + j, ldy);
      });
    }
  }
}

// ---- entries ------------------------------------------------------------------------------------

void pair_float(const Weights& w, const Weights& v, int64_t p0, int64_t p1, const Rows& x,
                const int32_t* index, int m, float* y, float* z, int64_t ldy, const Tile& tile) {
  matmul_float(w, p0, p1, x, index, m, y, ldy, tile, nullptr);
  matmul_float(v, p0, p1, x, index, m, z, ldy, tile, nullptr);
}

struct TypeEntry {
  Type type;
  decltype(Kernels::matmul) matmul;
  decltype(Kernels::matmul_pair) pair;
};

template <Type T> constexpr TypeEntry quantised() {
  return {T, matmul_quantised<T>, pair_quantised<T>};
}

constexpr TypeEntry kTypes[] = {
    {Type::F32, matmul_float, pair_float}, {Type::F16, matmul_float, pair_float},
    {Type::BF16, matmul_float, pair_float},
    quantised<Type::Q4_0>(), quantised<Type::Q4_1>(), quantised<Type::Q5_0>(),
    quantised<Type::Q5_1>(), quantised<Type::Q8_0>(), quantised<Type::Q4_K>(),
    quantised<Type::Q5_K>(), quantised<Type::Q6_K>(), quantised<Type::IQ4_NL>(),
    quantised<Type::IQ4_XS>(), quantised<Type::IQ4_KS>(), quantised<Type::IQ4_KSS>(),
};

const TypeEntry& entry(Type type) {
  for (const TypeEntry& e : kTypes)
    if (e.type == type) return e;
  __builtin_trap();  // module.cpp has checked the type
}

}  // namespace

namespace DESKSIDE_ISA {

void quantize(const float* x, int64_t first, int64_t n, uint8_t* record, int64_t cols) {
  constexpr int parts = 32 / kLanes;
  const int64_t blocks = cols / 32;
  auto* q = reinterpret_cast<int8_t*>(record);
  auto* d = reinterpret_cast<float*>(record + cols);
  float* s = d + blocks;
  auto* c32 = reinterpret_cast<int32_t*>(s + blocks);
  int32_t* c16 = c32 + blocks;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integer, ties to even
  for (int64_t b = first / 32; b < (first + n) / 32; b++, x += 32) {
    vf v[parts], top = vf{}, poison = vf{};  // poison: NaN if any value is NaN or infinite
    for (int i = 0; i < parts; i++) {
      v[i] = load(x + kLanes * i);
      top = vmax(top, vmax(v[i], -v[i]));
      poison += v[i] * 0.0f;
    }
    const float amax = max(top), bad = sum(poison);
    // Below 1e-30 the inverse would overflow; such a block counts as zero.
    const vf inverse = splat(amax > 1e-30f && bad == 0 ? 127.0f / amax : 0.0f);
    vi total[2] = {vi{}, vi{}};
    for (int i = 0; i < parts; i++) {
      const vf scaled = v[i] * inverse;
      const vf finite = scaled == scaled ? scaled : vf{};
      const vi r = __builtin_convertvector((finite + magic) - magic, vi);
#if defined(DESKSIDE_AVX512)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32 * b + kLanes * i),
                       _mm512_cvtepi32_epi8((__m512i)r));
#else
      for (int j = 0; j < kLanes; j++) q[32 * b + kLanes * i + j] = int8_t(r[j]);
#endif
      total[i * kLanes / 16] += r;
    }
    d[b] = (amax > 1e-30f ? amax / 127.0f : 0.0f) + bad;
    const int32_t low = int32_t(sum(__builtin_convertvector(total[0], vf)));
    const int32_t high = int32_t(sum(__builtin_convertvector(total[1], vf)));
    s[b] = d[b] * float(low + high);
    c32[b] = -128 * (low + high);
    c16[2 * b] = -128 * low;
    c16[2 * b + 1] = -128 * high;
  }
}

int64_t dot_peak(int64_t rounds, int32_t* result) {
  constexpr int kSums = kBias != 0 ? 12 : 4;  // enough to hide the latency of a dot product
  Bytes sum[kSums], w = splat_byte(3), x = splat_byte(1);
  const Bytes abs = magnitude(w);
  for (int i = 0; i < kSums; i++) sum[i] = splat_lane(0);
  for (int64_t r = 0; r < rounds; r++) {
    // Other operands each time as far as the compiler knows: nothing can be taken out of the loop.
    // No register holds an emulated vector, and its speed is of no interest.
#if defined(__x86_64__) && !defined(DESKSIDE_EMULATED)
    asm volatile("" : "+v"(x));
#endif
    for (int i = 0; i < kSums; i++) {
#if defined(__x86_64__) && !defined(DESKSIDE_EMULATED)
      asm volatile("" : "+v"(w));
#endif
      sum[i] = dot4(sum[i], w, abs, x);
    }
  }
  for (int i = 1; i < kSums; i++) sum[0] = (Bytes)((vi)sum[0] + (vi)sum[i]);
  *result = ((vi)sum[0])[0];
  return rounds * kSums * kLanes * 4;
}

void matmul(const Weights& w, int64_t p0, int64_t p1, const Rows& x, const int32_t* index, int m,
            float* y, int64_t ldy, const Tile& tile, const uint8_t* then) {
  entry(w.type).matmul(w, p0, p1, x, index, m, y, ldy, tile, then);
}

void matmul_pair(const Weights& w, const Weights& v, int64_t p0, int64_t p1, const Rows& x,
                 const int32_t* index, int m, float* y, float* z, int64_t ldy, const Tile& tile) {
  if (w.type == v.type)
    return entry(w.type).pair(w, v, p0, p1, x, index, m, y, z, ldy, tile);
  for (int64_t p = p0; p < p1; p++) {
    entry(w.type).matmul(w, p, p + 1, x, index, m, y, ldy, tile, nullptr);
    entry(v.type).matmul(v, p, p + 1, x, index, m, z, ldy, tile, nullptr);
  }
}

}  // namespace DESKSIDE_ISA
}  // namespace deskside
