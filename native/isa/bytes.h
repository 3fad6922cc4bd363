// Registers of bytes, as wide as the including file's instruction set, and the integer dot product
// of four bytes per lane. Everything here has internal linkage.
//
// A panel (panel.h) has 16 rows of weights side by side: 64 bytes have 4 consecutive weights of
// each row. A register has kLanes of the 16 rows. So 64 bytes are kParts registers, numbered by
// `part`.
#pragma once

#include "kernels.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deskside {
namespace {

constexpr int kParts = kPanelRows / kLanes;

#if defined(DESKSIDE_AVX512)

using Bytes = __m512i;
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline Bytes splat_byte(int x) { return _mm512_set1_epi8(char(x)); }
inline Bytes splat_lane(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes splat_lane(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
template <int N> inline Bytes shift_right_16(Bytes b) { return _mm512_srli_epi16(b, N); }
template <int N> inline Bytes shift_left_16(Bytes b) { return _mm512_slli_epi16(b, N); }
inline Bytes shift_right_lane(Bytes b, int n) { return _mm512_srl_epi32(b, _mm_cvtsi32_si128(n)); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
// The bits `low` of a and `high` of b. No bit may be in both.
inline Bytes join_bits(Bytes low, Bytes a, Bytes high, Bytes b) {
  return _mm512_ternarylogic_epi32(low, a, b, 0xca) & (low | high);
}
inline Bytes table_16(const int8_t* t) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
}
inline Bytes look_up(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
// Per byte: a where the highest bit of `by` is set, else b.
inline Bytes choose(Bytes by, Bytes a, Bytes b) {
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(by), b, a);
}
inline Bytes look_up_either(Bytes by, Bytes a, Bytes b, Bytes index) {
  return _mm512_mask_shuffle_epi8(look_up(b, index), _mm512_movepi8_mask(by), a, index);
}
// Lanes from bytes and 16-bit words, one a lane.
inline Bytes widen_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes widen_u16(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vf to_float(Bytes lanes) { return (vf)_mm512_cvtepi32_ps(lanes); }
// Copies the lowest byte of each lane to all four bytes. Lanes must be below 256.
inline Bytes repeat_byte(Bytes lanes) {
  return _mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8,
                                                                         8, 8, 8, 12, 12, 12, 12)));
}

// dpbusd multiplies unsigned by signed bytes, so weights have 128 added. The sum starts at -128
// times the sum of x, which the activations' record has (c32, c16).
constexpr int kBias = 128;
inline Bytes dot4(Bytes acc, Bytes w, Bytes, Bytes x) { return _mm512_dpbusd_epi32(acc, w, x); }
inline Bytes magnitude(Bytes w) { return w; }

#elif defined(__AVX2__)

using Bytes = __m256i;
inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_bytes(void* p, Bytes b) { _mm256_storeu_si256(static_cast<__m256i*>(p), b); }
inline Bytes splat_byte(int x) { return _mm256_set1_epi8(char(x)); }
inline Bytes splat_lane(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes splat_lane(const void* p) {
  float f;
  std::memcpy(&f, p, 4);
  return _mm256_castps_si256(_mm256_set1_ps(f));
}
template <int N> inline Bytes shift_right_16(Bytes b) { return _mm256_srli_epi16(b, N); }
template <int N> inline Bytes shift_left_16(Bytes b) { return _mm256_slli_epi16(b, N); }
inline Bytes shift_right_lane(Bytes b, int n) { return _mm256_srl_epi32(b, _mm_cvtsi32_si128(n)); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes join_bits(Bytes low, Bytes a, Bytes high, Bytes b) { return (a & low) | (b & high); }
inline Bytes table_16(const int8_t* t) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
}
inline Bytes look_up(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes choose(Bytes by, Bytes a, Bytes b) { return _mm256_blendv_epi8(b, a, by); }
inline Bytes look_up_either(Bytes by, Bytes a, Bytes b, Bytes index) {
  return choose(by, look_up(a, index), look_up(b, index));
}
inline Bytes widen_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes widen_u16(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vf to_float(Bytes lanes) { return (vf)_mm256_cvtepi32_ps(lanes); }
inline Bytes repeat_byte(Bytes lanes) {
  return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                        0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
}

// Sums of two products in 16 bits, for unsigned weights.
inline Bytes pairs(Bytes w, Bytes x) { return _mm256_maddubs_epi16(w, x); }
inline Bytes add_pairs(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes add_sums(Bytes acc, Bytes pairs) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  // Forces the addition here. Otherwise gcc 12 keeps a block's products on the stack to add later.
  asm("" : "+x"(acc));
  return acc;
}
// |w| as unsigned bytes and x with the sign of w: pairs stay within 2 * 128 * 127 < 2^15.
constexpr int kBias = 0;
inline Bytes magnitude(Bytes w) { return _mm256_abs_epi8(w); }
inline Bytes dot4(Bytes acc, Bytes w, Bytes abs, Bytes x) {
  return add_sums(acc, pairs(abs, _mm256_sign_epi8(x, w)));
}

#else

typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint32_t Lanes __attribute__((vector_size(16)));

inline Bytes load_bytes(const void* p) {
  Bytes b;
  std::memcpy(&b, p, 16);
  return b;
}
inline void store_bytes(void* p, Bytes b) { std::memcpy(p, &b, 16); }
inline Bytes splat_byte(int x) { return Bytes{} + int8_t(x); }
inline Bytes splat_lane(int32_t x) { return (Bytes)(Lanes{} + uint32_t(x)); }
inline Bytes splat_lane(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return splat_lane(x);
}
template <int N> inline Bytes shift_right_16(Bytes b) { return (Bytes)((Words)b >> N); }
template <int N> inline Bytes shift_left_16(Bytes b) { return (Bytes)((Words)b << N); }
inline Bytes shift_right_lane(Bytes b, int n) { return (Bytes)((Lanes)b >> uint32_t(n)); }
inline Bytes add_bytes(Bytes a, Bytes b) { return a + b; }
inline Bytes join_bits(Bytes low, Bytes a, Bytes high, Bytes b) { return (a & low) | (b & high); }
inline Bytes table_16(const int8_t* t) { return load_bytes(t); }
inline Bytes look_up(Bytes table, Bytes index) {
#if defined(__SSSE3__)
  return (Bytes)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
#else
  Bytes y;
  for (int i = 0; i < 16; i++) y[i] = table[index[i] & 15];
  return y;
#endif
}
inline Bytes choose(Bytes by, Bytes a, Bytes b) { return by < 0 ? a : b; }
inline Bytes look_up_either(Bytes by, Bytes a, Bytes b, Bytes index) {
  return choose(by, look_up(a, index), look_up(b, index));
}
template <class T> inline Bytes widen(const uint8_t* p) {
  Lanes y;
  for (int i = 0; i < 4; i++) {
    T x;
    std::memcpy(&x, p + i * sizeof x, sizeof x);
    y[i] = uint32_t(int32_t(x));
  }
  return (Bytes)y;
}
inline Bytes widen_u8(const uint8_t* p) { return widen<uint8_t>(p); }
inline Bytes widen_u16(const uint8_t* p) { return widen<uint16_t>(p); }
inline vf to_float(Bytes lanes) { return __builtin_convertvector((vi)lanes, vf); }
inline Bytes repeat_byte(Bytes lanes) { return (Bytes)((Lanes)lanes * 0x01010101u); }

constexpr int kBias = 0;
#if defined(__SSSE3__)
inline Bytes pairs(Bytes w, Bytes x) { return (Bytes)_mm_maddubs_epi16((__m128i)w, (__m128i)x); }
inline Bytes add_pairs(Bytes a, Bytes b) { return (Bytes)((Words)a + (Words)b); }
inline Bytes add_sums(Bytes acc, Bytes pairs) {
  return (Bytes)_mm_add_epi32((__m128i)acc, _mm_madd_epi16((__m128i)pairs, _mm_set1_epi16(1)));
}
inline Bytes magnitude(Bytes w) { return (Bytes)_mm_abs_epi8((__m128i)w); }
inline Bytes dot4(Bytes acc, Bytes w, Bytes abs, Bytes x) {
  return add_sums(acc, pairs(abs, (Bytes)_mm_sign_epi8((__m128i)x, (__m128i)w)));
}
#else
inline Bytes magnitude(Bytes w) { return w; }
inline Bytes dot4(Bytes acc, Bytes w, Bytes, Bytes x) {
  vi sum = (vi)acc;
  for (int i = 0; i < 16; i++) sum[i / 4] += int(w[i]) * int(x[i]);
  return (Bytes)sum;
}
#endif

#endif

// Groups whose products with unsigned weights up to `top` are summed in pairs of 16 bits; 0: none.
constexpr int in_pairs(int top) {
#if defined(__SSSE3__) && !defined(DESKSIDE_AVX512)
  return top == 0 ? 0 : 32767 / (2 * 127 * top);
#else
  return top * 0;
#endif
}

}  // namespace
}  // namespace deskside
