// Quantised rows to 8-bit integers and float scales, one function per type (FACTS 3.3).
//
// decode<T>(p, row_scale, w, scale, min) unpacks one file block of 32 * Traits<T>::groups weights:
//   weight i = scale[i / 32] * w[i] - min[i / 32]        (min only where Traits<T>::has_min)
// except Q6_K, whose scales stand per 16 weights:  weight i = scale[i / 16] * w[i].
#pragma once

#include "kernels.h"
#include "quants.h"
#include "simd.h"

namespace deskside {
namespace {

template <Type T> struct Traits;

template <class B, int Groups, bool HasMin = false, bool HasHeader = false, bool Halves = false>
struct TraitsOf {
  using Block = B;
  static constexpr int groups = Groups;        // blocks of 32 weights in a file block
  static constexpr bool has_min = HasMin;
  static constexpr int header = HasHeader ? 4 : 0;  // bytes of float scale before the row
  static constexpr bool halves = Halves;       // a scale per 16 weights
};
template <> struct Traits<Type::Q4_0> : TraitsOf<BlockQ4_0, 1> {};
template <> struct Traits<Type::Q4_1> : TraitsOf<BlockQ4_1, 1, true> {};
template <> struct Traits<Type::Q5_0> : TraitsOf<BlockQ5_0, 1> {};
template <> struct Traits<Type::Q5_1> : TraitsOf<BlockQ5_1, 1, true> {};
template <> struct Traits<Type::Q8_0> : TraitsOf<BlockQ8_0, 1> {};
template <> struct Traits<Type::Q4_K> : TraitsOf<BlockQ4_K, 8, true> {};
template <> struct Traits<Type::Q5_K> : TraitsOf<BlockQ5_K, 8, true> {};
template <> struct Traits<Type::Q6_K> : TraitsOf<BlockQ6_K, 8, false, false, true> {};
template <> struct Traits<Type::IQ4_NL> : TraitsOf<BlockIQ4_NL, 1> {};
template <> struct Traits<Type::IQ4_XS> : TraitsOf<BlockIQ4_XS, 8> {};
template <> struct Traits<Type::IQ4_KS> : TraitsOf<BlockIQ4_KS, 8, false, true> {};
template <> struct Traits<Type::IQ4_KSS> : TraitsOf<BlockIQ4_KSS, 8, false, true> {};

inline void copy_32(const int8_t* from, int8_t* to) {
#if defined(__AVX2__)
  // As one store: see look_up.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  std::memcpy(to, from, 32);
#endif
}

// 16 bytes of nibbles through a 16-entry table: low nibbles to w[0..15], high ones to w[16..31].
#if defined(__AVX2__)
// A byte a nibble: the low ones of 16 bytes, then the high ones.
inline __m256i split_nibbles(__m128i x) {
  const __m256i pair = _mm256_set_m128i(_mm_srli_epi16(x, 4), x);
  return _mm256_and_si256(pair, _mm256_set1_epi8(15));
}

inline void look_up(__m128i x, const int8_t* table, int8_t* w) {
  const __m256i t =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i values = _mm256_shuffle_epi8(t, split_nibbles(x));
  // One store as wide as the load that follows: two halves could not be forwarded to it.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w), values);
}
#endif

inline void look_up(const uint8_t* x, const int8_t* table, int8_t* w) {
#if defined(__AVX2__)
  look_up(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), table, w);
#else
  for (int i = 0; i < 16; i++) {
    w[i] = table[x[i] & 15];
    w[i + 16] = table[x[i] >> 4];
  }
#endif
}

// Eight words of IQ4_KSS: bit 0 of word k is bit k of the scale, which is returned; the other 15
// bits, xored with themselves shifted by one, are four nibbles with an even number of set bits.
inline int look_up_kss(const uint16_t* q, int8_t* w) {
#if defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  // The low bits moved to the sign, sixteen words narrowed to bytes with their signs kept.
  const __m128i low = _mm_slli_epi16(x, 15);
  const int s = _mm_movemask_epi8(_mm_packs_epi16(low, _mm_setzero_si128()));
  const __m128i v = _mm_and_si128(x, _mm_set1_epi16(int16_t(0xfffe)));
  look_up(_mm_xor_si128(v, _mm_srli_epi16(v, 1)), kCodebook[s & 1], w);
#else
  uint8_t nibbles[16];
  int s = 0;
  for (int k = 0; k < 8; k++) {
    s |= (q[k] & 1) << k;
    const uint16_t v = q[k] & 0xfffe, pair = v ^ (v >> 1);
    nibbles[2 * k] = uint8_t(pair);
    nibbles[2 * k + 1] = uint8_t(pair >> 8);
  }
  look_up(nibbles, kCodebook[s & 1], w);
#endif
  return s;
}

// 16 bytes of nibbles to integers, low ones first: bit i of `fifth` is the fifth bit of weight i.
inline void nibbles(const uint8_t* x, uint32_t fifth, int offset, int8_t* w) {
#if defined(__AVX2__)
  const __m256i low = split_nibbles(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  // Byte i / 8 of `fifth` in byte i of the vector, then bit i % 8 of it.
  const __m256i bytes = _mm256_shuffle_epi8(
      _mm256_set1_epi32(int(fifth)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  const __m256i high = _mm256_and_si256(set, _mm256_set1_epi8(16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w),
                      _mm256_add_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(char(offset))));
#else
  for (int i = 0; i < 16; i++) {
    w[i] = int8_t((x[i] & 15) + ((fifth >> i & 1) << 4) + offset);
    w[i + 16] = int8_t((x[i] >> 4) + ((fifth >> (i + 16) & 1) << 4) + offset);
  }
#endif
}

// Eight small integers to floats, times d. (Left to itself the compiler converts one by one.)
inline void scale_bytes(const uint8_t* bytes, float d, float* y) {
#if defined(__AVX2__)
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_set1_ps(d)));
#else
  for (int i = 0; i < 8; i++) y[i] = d * float(int8_t(bytes[i]));
#endif
}

// The 6-bit scales and minimums of Q4_K and Q5_K, 12 bytes b: for j < 4 the low six bits of b[j] and
// b[j + 4]; the others have four bits in b[j + 4] and two on top of b[j - 4] and b[j].
inline void k_scales(const uint8_t* b, uint8_t* scales, uint8_t* mins) {
  uint32_t u[3];
  std::memcpy(u, b, 12);
  const uint32_t out[4] = {
      u[0] & 0x3f3f3f3f,
      (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4,
      u[1] & 0x3f3f3f3f,
      (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4,
  };
  std::memcpy(scales, out, 8);
  std::memcpy(mins, out + 2, 8);
}

template <Type T>
inline void decode(const typename Traits<T>::Block& b, float row, int8_t* w, float* scale,
                   float* min) {
  if constexpr (T == Type::Q4_0) {
    nibbles(b.qs, 0, -8, w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::Q4_1) {
    nibbles(b.qs, 0, 0, w);
    scale[0] = f16_to_float(b.d);
    min[0] = -f16_to_float(b.m);
  } else if constexpr (T == Type::Q5_0) {
    nibbles(b.qs, b.qh, -16, w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::Q5_1) {
    nibbles(b.qs, b.qh, 0, w);
    scale[0] = f16_to_float(b.d);
    min[0] = -f16_to_float(b.m);
  } else if constexpr (T == Type::Q8_0) {
    copy_32(b.qs, w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const float d = f16_to_float(b.d), dmin = f16_to_float(b.dmin);
    for (int g = 0; g < 4; g++) {  // 64 weights share 32 bytes: low nibbles first
      const uint8_t* q = b.qs + 32 * g;
      for (int i = 0; i < 32; i++) {
        int lo = q[i] & 15, hi = q[i] >> 4;
        if constexpr (T == Type::Q5_K) {
          lo |= ((b.qh[i] >> (2 * g)) & 1) << 4;
          hi |= ((b.qh[i] >> (2 * g + 1)) & 1) << 4;
        }
        w[64 * g + i] = int8_t(lo);
        w[64 * g + 32 + i] = int8_t(hi);
      }
    }
    uint8_t scales[8], mins[8];
    k_scales(b.scales, scales, mins);
    scale_bytes(scales, d, scale);
    scale_bytes(mins, dmin, min);
  } else if constexpr (T == Type::Q6_K) {
    for (int h = 0; h < 2; h++) {
      const uint8_t *ql = b.ql + 64 * h, *qh = b.qh + 32 * h;
      int8_t* y = w + 128 * h;
      for (int i = 0; i < 32; i++) {
        y[i] = int8_t(((ql[i] & 15) | (qh[i] & 3) << 4) - 32);
        y[i + 32] = int8_t(((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4) - 32);
        y[i + 64] = int8_t((ql[i] >> 4 | (qh[i] >> 4 & 3) << 4) - 32);
        y[i + 96] = int8_t((ql[i + 32] >> 4 | (qh[i] >> 6 & 3) << 4) - 32);
      }
    }
    const float d = f16_to_float(b.d);
    for (int j = 0; j < 16; j += 8)
      scale_bytes(reinterpret_cast<const uint8_t*>(b.scales + j), d, scale + j);
  } else if constexpr (T == Type::IQ4_NL) {
    look_up(b.qs, kCodebook[0], w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::IQ4_XS) {
    const float d = f16_to_float(b.d);
    for (int j = 0; j < 8; j++) {
      const int ls = ((b.scales_l[j / 2] >> (4 * (j & 1))) & 15) | ((b.scales_h >> (2 * j)) & 3) << 4;
      scale[j] = d * (ls - 32);
      look_up(b.qs + 16 * j, kCodebook[0], w + 32 * j);
    }
  } else if constexpr (T == Type::IQ4_KS) {
    for (int j = 0; j < 8; j++) {
      const int s = b.scales[j];
      scale[j] = row * ((s & 254) - 127);
      look_up(b.qs + 16 * j, kCodebook[s & 1], w + 32 * j);
    }
  } else {
    static_assert(T == Type::IQ4_KSS);
    for (int j = 0; j < 8; j++) {
      const int s = look_up_kss(b.qs + 8 * j, w + 32 * j);
      scale[j] = row * ((s & 254) - 127);
    }
  }
}

// The float scale before the rows of IQ4_KS and IQ4_KSS; rows are only 4-byte aligned.
template <Type T> inline float row_scale(const uint8_t* row) {
  float d = 0;
  if constexpr (Traits<T>::header != 0) std::memcpy(&d, row, 4);
  return d;
}

template <Type T> inline const typename Traits<T>::Block* row_blocks(const uint8_t* row) {
  return reinterpret_cast<const typename Traits<T>::Block*>(row + Traits<T>::header);
}

}  // namespace
}  // namespace deskside
