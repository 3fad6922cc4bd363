// Rows of a KV cache: f32, f16 or q8_0. Everything here has internal linkage.
#pragma once

#include "kernels.h"
#include "quants.h"
#include "simd.h"

#include <math.h>

namespace deskside {
namespace {

inline vf load_f16(const uint8_t* p) {
#if defined(DESKSIDE_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  float y[kLanes];
  for (int i = 0; i < kLanes; i += 8)
    _mm256_storeu_ps(
        y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i))));
  return load(y);
#else
  // The bits as a float 2^112 too small, subnormals included, scaled up; infinity and NaN apart.
  typedef uint16_t halves __attribute__((vector_size(2 * kLanes)));
  halves h;
  memcpy(&h, p, sizeof h);
  const vi wide = __builtin_convertvector(h, vi), magnitude = wide & 0x7fff;
  const vi bits = magnitude << 13, special = bits | 0x7f800000;
  const vf scaled = (vf)bits * 0x1p112f;
  return (vf)((magnitude >= 0x7c00 ? special : (vi)scaled) | (wide & 0x8000) << 16);
#endif
}

inline void store_f16(uint8_t* p, const float* x) {
#if defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#else
  for (int i = 0; i < kLanes; i++) {
    const uint16_t h = float_to_f16(x[i]);
    memcpy(p + 2 * i, &h, 2);
  }
#endif
}

inline vf load_int8(const int8_t* p) {
#if defined(DESKSIDE_AVX512)
  const vi x = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  vi x;
  for (int i = 0; i < kLanes; i += 8) {
    const __m256i part =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i)));
    memcpy(reinterpret_cast<int32_t*>(&x) + i, &part, sizeof part);
  }
#else
  vi x;
  for (int i = 0; i < kLanes; i++) x[i] = p[i];
#endif
  return __builtin_convertvector(x, vf);
}

// Nearest integers, ties to even, of values in [-128, 127].
inline void store_int8(int8_t* p, vf v) {
#if defined(DESKSIDE_AVX512)
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
  memcpy(p, &bytes, sizeof bytes);
#elif defined(__AVX2__)
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; i += 8) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_loadu_ps(x + i));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p + i), _mm_packs_epi16(words, words));
  }
#else
  for (int i = 0; i < kLanes; i++) p[i] = int8_t(lrintf(v[i]));
#endif
}

// d = max|x| / 127 and x / d in 8 bits. Beside a NaN or an infinity d is NaN, so that it travels on.
inline void store_q8_0(uint8_t* p, const float* x) {
  constexpr int parts = 32 / kLanes;
  vf v[parts], top = vf{}, poison = vf{};  // poison: NaN if any value is NaN or infinite
  for (int i = 0; i < parts; i++) {
    v[i] = load(x + i * kLanes);
    top = vmax(vmax(v[i], -v[i]), top);
    poison += v[i] * 0.0f;
  }
  const float nan = sum(poison), d = max(top) / 127.0f;
  const bool finite = nan == 0;
  const float inverse = d > 0 && finite ? 1.0f / d : 0.0f;
  BlockQ8_0 block;
  for (int i = 0; i < parts; i++)
    store_int8(block.qs + i * kLanes, finite ? v[i] * inverse : vf{});
  block.d = float_to_f16(d + nan);
  memcpy(p, &block, sizeof block);
}

// A row's values c .. c + 31 as floats; `c` is a multiple of 32.
template <Type T> inline void decode32(const uint8_t* row, int c, float* y) {
  if constexpr (T == Type::Q8_0) {
    const auto* block = reinterpret_cast<const BlockQ8_0*>(row) + c / 32;
    const float d = f16_to_float(block->d);
    for (int i = 0; i < 32; i += kLanes) store(y + i, load_int8(block->qs + i) * d);
  } else if constexpr (T == Type::F16) {
    for (int i = 0; i < 32; i += kLanes) store(y + i, load_f16(row + 2 * (c + i)));
  } else {
    const float* x = reinterpret_cast<const float*>(row) + c;
    for (int i = 0; i < 32; i += kLanes) store(y + i, load(x + i));
  }
}

// The same at the end of a row of floats that is no multiple of 32; what is behind its end is 0.
template <Type T> inline void decode_last(const uint8_t* row, int c, int n, float* y) {
  for (int i = 0; i < 32; i++) {
    float x = 0;
    if (i < n && T == Type::F32) memcpy(&x, row + 4 * (c + i), 4);
    if (i < n && T == Type::F16) {
      uint16_t h;
      memcpy(&h, row + 2 * (c + i), 2);
      x = f16_to_float(h);
    }
    y[i] = x;
  }
}

// Rows of the cache, one a position, `row_bytes` apart, with `dim` values each.
struct Source {
  const uint8_t* rows;
  int64_t row_bytes;
  int dim;
};

// Columns [c0, c0 + columns) of n rows from `first` on as floats, `pitch` apart. c0 and columns are
// multiples of 32.
template <Type T>
inline void decode_rows(const Source& s, int64_t first, int n, int c0, int columns, float* to,
                        int64_t pitch) {
  for (int i = 0; i < n; i++) {
    const uint8_t* row = s.rows + (first + i) * s.row_bytes;
    for (int c = c0; c < c0 + columns; c += 32) {
      float* y = to + i * pitch + c - c0;
      if (c + 32 <= s.dim) decode32<T>(row, c, y);
      else decode_last<T>(row, c, s.dim - c, y);
    }
  }
}

inline void decode_rows(Type type, const Source& s, int64_t first, int n, int c0, int columns,
                        float* to, int64_t pitch) {
  if (type == Type::F32) return decode_rows<Type::F32>(s, first, n, c0, columns, to, pitch);
  if (type == Type::F16) return decode_rows<Type::F16>(s, first, n, c0, columns, to, pitch);
  decode_rows<Type::Q8_0>(s, first, n, c0, columns, to, pitch);
}

}  // namespace
}  // namespace deskside
