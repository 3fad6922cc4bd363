// Matrix products on quantised blocks. Compiled once per instruction set (DESKSIDE_ISA).
//
// Quantised weights meet activations rounded to 8 bits per block of 32; products are summed exactly
// in integers within a block and in float32 over blocks. Float weights meet float activations.
//
// Few rows of x (m <= 4): a file block is decoded to L1 and used at once, so the weights stream.
// More: kTileRows rows are decoded once and used by all rows of x, four at a time.
#include "decode.h"
#include "matmul_entry.h"

namespace deskside {
namespace {

constexpr int kMaxDirect = 4;
// Bytes ahead: the hardware's prefetcher stops at the end of a 4 KiB page.
constexpr int64_t kPrefetch = 2048;

// ---- one block of 32 products -------------------------------------------------------------------

#if defined(__AVX2__)

// |w| as unsigned bytes and x with the sign of w: maddubs pairs stay within 2 * 127 * 127 < 2^15
// (|w| may be 128, and |x| <= 127: 32512).
struct Weights32 {
  __m256i w, abs;
  explicit Weights32(const int8_t* p)
      : w(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), abs(_mm256_abs_epi8(w)) {}

  // Eight sums of four products.
  __m256 dot(const int8_t* q) const {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i pairs = _mm256_maddubs_epi16(abs, _mm256_sign_epi8(x, w));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
using Acc = __m256;

// The block's scale in every lane, or those of its two halves of 16 weights.
template <bool Halves> inline Acc scale_vector(const float* scale) {
  if constexpr (Halves) {
    const __m128 both = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale)));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(both),
                                    _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  } else {
    return _mm256_set1_ps(*scale);
  }
}
inline Acc zero() { return _mm256_setzero_ps(); }
inline void add_scaled(Acc& acc, Acc dot, Acc scale, float d) {
  acc = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, _mm256_set1_ps(d)), acc);
}
inline float total(Acc a) {
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

#else

struct Acc {
  float half[2];
};
struct Weights32 {
  const int8_t* w;
  explicit Weights32(const int8_t* p) : w(p) {}

  Acc dot(const int8_t* q) const {
    int32_t s[2] = {0, 0};
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < 16; i++) s[h] += w[16 * h + i] * q[16 * h + i];
    return {{float(s[0]), float(s[1])}};
  }
};
template <bool Halves> inline Acc scale_vector(const float* scale) {
  return {{scale[0], scale[Halves ? 1 : 0]}};
}
inline Acc zero() { return {{0, 0}}; }
inline void add_scaled(Acc& acc, Acc dot, Acc scale, float d) {
  for (int h = 0; h < 2; h++) acc.half[h] += dot.half[h] * (scale.half[h] * d);
}
inline float total(Acc a) { return a.half[0] + a.half[1]; }

#endif

// ---- quantised weights --------------------------------------------------------------------------

struct Activation {
  const int8_t* q;
  const float *d, *s;
};

inline Activation activation(const Rows& x, const int32_t* index, int i) {
  const int64_t row = index ? index[i] : i, blocks = x.cols / 32;
  return {x.q + row * x.cols, x.d + row * blocks, x.s + row * blocks};
}

// One row of w against M rows of x.
template <Type T, int M>
void dot_direct(const uint8_t* row, int64_t cols, const Activation* x, float* y, int64_t ldy) {
  using Tr = Traits<T>;
  constexpr int per = Tr::halves ? 2 : 1;
  alignas(64) int8_t w[32 * Tr::groups];
  float scale[Tr::groups * per], min[Tr::groups];
  Acc acc[M];
  float correction[M];
  for (int i = 0; i < M; i++) acc[i] = zero(), correction[i] = 0;
  // The minimums of a row meet the block sums of x: vectors of them for the types that have many.
  constexpr bool wide_min = Tr::has_min && Tr::groups % kLanes == 0;
  vf wide_correction[M] = {};

  const float d = row_scale<T>(row);
  const auto* blocks = row_blocks<T>(row);
  for (int64_t b = 0; b < cols / (32 * Tr::groups); b++) {
    for (size_t line = 0; line < sizeof(*blocks); line += 64)
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(blocks + b) + kPrefetch + line);
    decode<T>(blocks[b], d, w, scale, min);
    for (int g = 0; g < Tr::groups; g++) {
      const int64_t block = b * Tr::groups + g;
      const Weights32 weights(w + 32 * g);
      const Acc sv = scale_vector<Tr::halves>(scale + per * g);
      for (int i = 0; i < M; i++) {
        add_scaled(acc[i], weights.dot(x[i].q + 32 * block), sv, x[i].d[block]);
        if constexpr (Tr::has_min && !wide_min) correction[i] += min[g] * x[i].s[block];
      }
    }
    if constexpr (wide_min)
      for (int i = 0; i < M; i++)
        for (int g = 0; g < Tr::groups; g += kLanes)
          wide_correction[i] += load(min + g) * load(x[i].s + b * Tr::groups + g);
  }
  for (int i = 0; i < M; i++)
    y[i * ldy] = total(acc[i]) - (wide_min ? sum(wide_correction[i]) : correction[i]);
}

// Decoded rows of the tile against M rows of x, two rows of w at a time.
template <bool HasMin, bool Halves, int R, int M>
void dot_tile(const Tile& t, int r, int64_t cols, const Activation* x, float* y, int64_t ldy) {
  constexpr int per = Halves ? 2 : 1;
  const int64_t blocks = cols / 32;
  Acc acc[R][M];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) acc[j][i] = zero();

  const int8_t* w = t.w + r * cols;
  const float* scale = t.scale + r * blocks * per;
  const float* min = t.min + r * blocks;
  for (int64_t b = 0; b < blocks; b++) {
    for (int j = 0; j < R; j++) {
      const Weights32 weights(w + j * cols + 32 * b);
      const Acc sv = scale_vector<Halves>(scale + (j * blocks + b) * per);
      for (int i = 0; i < M; i++) {
        add_scaled(acc[j][i], weights.dot(x[i].q + 32 * b), sv, x[i].d[b]);
      }
    }
  }
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) {
      y[i * ldy + j] = total(acc[j][i]);
      if constexpr (HasMin) y[i * ldy + j] -= dot(min + j * blocks, x[i].s, blocks);
    }
}

template <Type T> void decode_row(const uint8_t* row, int64_t cols, const Tile& t, int slot) {
  using Tr = Traits<T>;
  constexpr int per = Tr::halves ? 2 : 1;
  const float d = row_scale<T>(row);
  const auto* blocks = row_blocks<T>(row);
  for (int64_t b = 0; b < cols / (32 * Tr::groups); b++) {
    const int64_t g = slot * (cols / 32) + b * Tr::groups;
    decode<T>(blocks[b], d, t.w + 32 * g, t.scale + g * per, t.min + g);
  }
}

template <Type T>
void matmul_quantised(const Matrix& w, int64_t r0, int64_t r1, const Rows& x, const int32_t* index,
                      int m, float* y, int64_t ldy, const Tile& tile) {
  using Tr = Traits<T>;
  Activation a[4];
  if (m <= kMaxDirect) {
    for (int i = 0; i < m; i++) a[i] = activation(x, index, i);
    for (int64_t r = r0; r < r1; r++) {
      const uint8_t* row = w.data + r * w.row_bytes;
      switch (m) {
        case 1: dot_direct<T, 1>(row, w.cols, a, y + r, ldy); break;
        case 2: dot_direct<T, 2>(row, w.cols, a, y + r, ldy); break;
        case 3: dot_direct<T, 3>(row, w.cols, a, y + r, ldy); break;
        case 4: dot_direct<T, 4>(row, w.cols, a, y + r, ldy); break;
      }
    }
    return;
  }
  for (int64_t r = r0; r < r1; r += kTileRows) {
    const int rows = int(r1 - r < kTileRows ? r1 - r : kTileRows);
    for (int j = 0; j < rows; j++) decode_row<T>(w.data + (r + j) * w.row_bytes, w.cols, tile, j);
    for (int i = 0; i < m; i += 4) {
      const int n = m - i < 4 ? m - i : 4;
      for (int k = 0; k < n; k++) a[k] = activation(x, index, i + k);
      float* out = y + int64_t(i) * ldy + r;
      int j = 0;
      for (; n == 4 && j + 2 <= rows; j += 2)
        dot_tile<Tr::has_min, Tr::halves, 2, 4>(tile, j, w.cols, a, out + j, ldy);
      for (; j < rows; j++) {
        switch (n) {
          case 1: dot_tile<Tr::has_min, Tr::halves, 1, 1>(tile, j, w.cols, a, out + j, ldy); break;
          case 2: dot_tile<Tr::has_min, Tr::halves, 1, 2>(tile, j, w.cols, a, out + j, ldy); break;
          case 3: dot_tile<Tr::has_min, Tr::halves, 1, 3>(tile, j, w.cols, a, out + j, ldy); break;
          case 4: dot_tile<Tr::has_min, Tr::halves, 1, 4>(tile, j, w.cols, a, out + j, ldy); break;
        }
      }
    }
  }
}

template <Type T> void dequantise_quantised(const Matrix& w, int64_t row, float* y, const Tile& t) {
  using Tr = Traits<T>;
  decode_row<T>(w.data + row * w.row_bytes, w.cols, t, 0);
  for (int64_t i = 0; i < w.cols; i++) {
    y[i] = t.scale[Tr::halves ? i / 16 : i / 32] * t.w[i];
    if constexpr (Tr::has_min) y[i] -= t.min[i / 32];
  }
}

// ---- float weights ------------------------------------------------------------------------------

inline float element(const uint8_t* row, Type type, int64_t i) {
  uint16_t h;
  if (type == Type::F32) return reinterpret_cast<const float*>(row)[i];
  std::memcpy(&h, row + 2 * i, 2);
  return type == Type::F16 ? f16_to_float(h) : bf16_to_float(h);
}

void to_float(const uint8_t* row, Type type, int64_t n, float* y) {
  if (type == Type::F32) {
    std::memcpy(y, row, size_t(4 * n));
    return;
  }
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
  for (; i < n; i++) y[i] = element(row, type, i);
}

// R rows of w against M rows of x.
template <int R, int M>
void dot_float(const float* const* w, int64_t cols, const float* const* x, float* y, int64_t ldy) {
  vf acc[R][M];
  float tail[R][M];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) acc[j][i] = vf{}, tail[j][i] = 0;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes)
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) acc[j][i] += load(w[j] + c) * load(x[i] + c);
  for (; c < cols; c++)
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) tail[j][i] += w[j][c] * x[i][c];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) y[i * ldy + j] = sum(acc[j][i]) + tail[j][i];
}

void matmul_float(const Matrix& w, int64_t r0, int64_t r1, const Rows& x, const int32_t* index,
                  int m, float* y, int64_t ldy, const Tile& tile) {
  for (int64_t r = r0; r < r1; r += kTileRows) {
    const int rows = int(r1 - r < kTileRows ? r1 - r : kTileRows);
    const float* row[kTileRows];
    for (int j = 0; j < rows; j++) {
      const uint8_t* raw = w.data + (r + j) * w.row_bytes;
      // GGUF aligns tensors to 32 bytes, rows of float32 to 4: they are read in place.
      row[j] = w.type == Type::F32 ? reinterpret_cast<const float*>(raw) : tile.f + j * w.cols;
      if (w.type != Type::F32) to_float(raw, w.type, w.cols, tile.f + j * w.cols);
    }
    for (int i = 0; i < m; i += 2) {
      const int n = m - i < 2 ? m - i : 2;
      const float* a[2];
      for (int k = 0; k < n; k++) a[k] = x.f + (index ? index[i + k] : i + k) * x.cols;
      float* out = y + int64_t(i) * ldy + r;
      if (rows == kTileRows && n == 2) {
        dot_float<kTileRows, 2>(row, w.cols, a, out, ldy);
      } else if (rows == kTileRows) {
        dot_float<kTileRows, 1>(row, w.cols, a, out, ldy);
      } else {
        for (int j = 0; j < rows; j++)
          for (int k = 0; k < n; k++)
            dot_float<1, 1>(row + j, w.cols, a + k, out + k * ldy + j, ldy);
      }
    }
  }
}

void dequantise_float(const Matrix& w, int64_t row, float* y, const Tile&) {
  to_float(w.data + row * w.row_bytes, w.type, w.cols, y);
}

// ---- entries ------------------------------------------------------------------------------------

struct TypeEntry {
  Type type;
  decltype(Kernels::matmul) matmul;
  decltype(Kernels::dequantize_row) dequantize_row;
};

template <Type T> constexpr TypeEntry quantised() {
  return {T, matmul_quantised<T>, dequantise_quantised<T>};
}

constexpr TypeEntry kTypes[] = {
    {Type::F32, matmul_float, dequantise_float},
    {Type::F16, matmul_float, dequantise_float},
    {Type::BF16, matmul_float, dequantise_float},
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

void quantize_row(const float* x, int64_t n, int8_t* q, float* d, float* s) {
  constexpr int parts = 32 / kLanes;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integer, ties to even
  for (int64_t b = 0; b < n / 32; b++) {
    vf v[parts], top = vf{}, poison = vf{};  // poison: NaN if any value is NaN or infinite
    for (int i = 0; i < parts; i++) {
      v[i] = load(x + 32 * b + kLanes * i);
      top = vmax(top, vmax(v[i], -v[i]));
      poison += v[i] * 0.0f;
    }
    const float amax = max(top);
    // Below 1e-30 the inverse would overflow; such a block counts as zero.
    const vf inverse = splat(amax > 1e-30f ? 127.0f / amax : 0.0f);
    vi total = vi{};
    for (int i = 0; i < parts; i++) {
      const vf scaled = v[i] * inverse;
      const vf finite = scaled == scaled ? scaled : vf{};
      const vi r = __builtin_convertvector((finite + magic) - magic, vi);
      for (int j = 0; j < kLanes; j++) q[32 * b + kLanes * i + j] = int8_t(r[j]);
      total += r;
    }
    d[b] = (amax > 1e-30f ? amax / 127.0f : 0.0f) + sum(poison);
    s[b] = d[b] * sum(__builtin_convertvector(total, vf));
  }
}

void matmul(const Matrix& w, int64_t r0, int64_t r1, const Rows& x, const int32_t* index, int m,
            float* y, int64_t ldy, const Tile& tile) {
  entry(w.type).matmul(w, r0, r1, x, index, m, y, ldy, tile);
}

void dequantize_row(const Matrix& w, int64_t row, float* y, const Tile& tile) {
  entry(w.type).dequantize_row(w, row, y, tile);
}

}  // namespace DESKSIDE_ISA
}  // namespace deskside
