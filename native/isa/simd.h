// Vectors of floats by compiler extension, as wide as the instruction set of the including file:
// one source for SSE, AVX2 and AVX-512. Everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include <math.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(DESKSIDE_EMULATED)
#include "emulate_avx512.h"
#endif

// For functions that take or return many registers: a call would pass them through memory. For
// AVX-512, gcc 12 inlines well by itself. Forced, it keeps the sums of the tile kernel in memory.
#if defined(DESKSIDE_AVX512)
#define DESKSIDE_INLINE inline
#else
#define DESKSIDE_INLINE __attribute__((always_inline)) inline
#endif

namespace deskside {
namespace {

#if defined(DESKSIDE_AVX512)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
inline vf splat(float x) { return vf{} + x; }

inline vf vmax(vf a, vf b) { return a > b ? a : b; }

typedef float vf4 __attribute__((vector_size(16)));
#if defined(__AVX2__)
typedef float vf8 __attribute__((vector_size(32)));
#endif

// Reduces a vector to one value: op joins the two halves until one lane is left. op takes vectors
// and floats.
template <class Op> inline float fold(vf v, Op op) {
#if defined(DESKSIDE_AVX512)
  const vf8 h = op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
  const vf h = v;
#endif
#if defined(__AVX2__)
  const vf4 q =
      op(__builtin_shufflevector(h, h, 0, 1, 2, 3), __builtin_shufflevector(h, h, 4, 5, 6, 7));
#else
  const vf q = v;
#endif
  const vf4 two = op(q, __builtin_shufflevector(q, q, 2, 3, 0, 1));
  return op(two[0], two[1]);
}
inline float sum(vf v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
inline float max(vf v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline float dot(const float* a, const float* b, int64_t n) {
  vf s = vf{};
  float tail = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) s += load(a + i) * load(b + i);
  for (; i < n; i++) tail += a[i] * b[i];
  return sum(s) + tail;
}

// e^x to about 2 ulp: x = n ln2 + r with |r| <= ln2 / 2, e^r by its Taylor series to r^7
// (remainder 5e-9), 2^n by the exponent bits. Saturates outside [-87, 88].
inline vf vexp(vf x) {
  const vf lo = splat(-87.0f), hi = splat(88.0f);
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504089f + magic) - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &e, sizeof scale);
  return p * scale;
}

// log(1 + e^x). With z = e^-|x| in (0, 1] and s = z / (2 + z) <= 1/3: log(1 + z) = 2 atanh(s), here
// up to s^15 (remainder below 1e-9).
inline vf vsoftplus(vf x) {
  const vf magnitude = vmax(x, -x), z = vexp(-magnitude), s = z / (z + 2.0f), t = s * s;
  vf p = splat(1.0f / 15);
  p = p * t + 1.0f / 13;
  p = p * t + 1.0f / 11;
  p = p * t + 1.0f / 9;
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  p = p * t + 1.0f;
  return vmax(x, vf{}) + 2.0f * s * p;
}

inline vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
inline float exp1(float x) { return vexp(splat(x))[0]; }
inline float sigmoid1(float x) { return vsigmoid(splat(x))[0]; }

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Place the bits as a float 2^112 too small, subnormals included, and scale it up.
  return bits_to_float(sign | magnitude << 13) * 0x1p112f;
#endif
}

inline uint16_t float_to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (u < 0x38800000) {
    // Subnormal: adding 0.5 aligns the mantissa so that the last place is 2^-24, rounded to even.
    const float f = bits_to_float(u) + 0.5f;
    std::memcpy(&u, &f, 4);
    return sign | uint16_t(u - 0x3f000000);
  }
  u += 0xfff + ((u >> 13) & 1);
  return sign | uint16_t((u - 0x38000000) >> 13);
#endif
}

// ---- vectors of other types ---------------------------------------------------------------------

typedef uint16_t halves __attribute__((vector_size(2 * kLanes)));

inline vf load_bf16(const uint8_t* p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
}

inline vf load_f16(const uint8_t* p) {
#if defined(DESKSIDE_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Place the bits as a float 2^112 too small, subnormals included, and scale it up. Infinity and
  // NaN are handled apart.
  halves h;
  std::memcpy(&h, p, sizeof h);
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
    std::memcpy(p + 2 * i, &h, 2);
  }
#endif
}

inline vf load_int8(const int8_t* p) {
#if defined(DESKSIDE_AVX512)
  const vi x = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const vi x = (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < kLanes; i++) x[i] = p[i];
#endif
  return __builtin_convertvector(x, vf);
}

// Stores the nearest integers of values in [-128, 127], ties to even.
inline void store_int8(int8_t* p, vf v) {
#if defined(DESKSIDE_AVX512)
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
  std::memcpy(p, &bytes, sizeof bytes);
#elif defined(__AVX2__)
  const __m256i q = _mm256_cvtps_epi32((__m256)v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < kLanes; i++) p[i] = int8_t(lrintf(v[i]));
#endif
}

}  // namespace
}  // namespace deskside
