// Vectors of floats by compiler extension, as wide as the instruction set of the including file:
// one source for SSE, AVX2 and AVX-512. Everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
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

// Halves are added until one lane is left.
template <class Op> inline float fold(vf v, Op op) {
  float a[kLanes];
  std::memcpy(a, &v, sizeof a);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) a[i] = op(a[i], a[i + n]);
  return a[0];
}
inline float sum(vf v) {
  return fold(v, [](float a, float b) { return a + b; });
}
inline float max(vf v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
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

}  // namespace
}  // namespace deskside
