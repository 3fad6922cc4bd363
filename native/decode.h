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

// 16 bytes of nibbles through a 16-entry table: low nibbles to w[0..15], high ones to w[16..31].
#if defined(__AVX2__)
inline void look_up(__m128i x, const int8_t* table, int8_t* w) {
  const __m256i t =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i pair = _mm256_set_m128i(_mm_srli_epi16(x, 4), x);
  const __m256i values = _mm256_shuffle_epi8(t, _mm256_and_si256(pair, _mm256_set1_epi8(15)));
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

inline void nibbles(const uint8_t* x, int offset, int8_t* w) {
  for (int i = 0; i < 16; i++) {
    w[i] = int8_t((x[i] & 15) + offset);
    w[i + 16] = int8_t((x[i] >> 4) + offset);
  }
}

// Adds the fifth bits of Q5_0 and Q5_1: bit i of `high` belongs to weight i.
inline void add_fifth_bits(uint32_t high, int8_t* w) {
  for (int i = 0; i < 32; i++) w[i] = int8_t(w[i] + (((high >> i) & 1) << 4));
}

// The packed 6-bit (scale, min) pair j of Q4_K and Q5_K.
inline void k_scale(const uint8_t* b, int j, int& sc, int& m) {
  if (j < 4) {
    sc = b[j] & 63;
    m = b[j + 4] & 63;
  } else {
    sc = (b[j + 4] & 15) | (b[j - 4] >> 6) << 4;
    m = (b[j + 4] >> 4) | (b[j] >> 6) << 4;
  }
}

template <Type T>
inline void decode(const typename Traits<T>::Block& b, float row, int8_t* w, float* scale,
                   float* min) {
  if constexpr (T == Type::Q4_0) {
    nibbles(b.qs, -8, w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::Q4_1) {
    nibbles(b.qs, 0, w);
    scale[0] = f16_to_float(b.d);
    min[0] = -f16_to_float(b.m);
  } else if constexpr (T == Type::Q5_0) {
    nibbles(b.qs, -16, w);
    add_fifth_bits(b.qh, w);
    scale[0] = f16_to_float(b.d);
  } else if constexpr (T == Type::Q5_1) {
    nibbles(b.qs, 0, w);
    add_fifth_bits(b.qh, w);
    scale[0] = f16_to_float(b.d);
    min[0] = -f16_to_float(b.m);
  } else if constexpr (T == Type::Q8_0) {
    std::memcpy(w, b.qs, 32);
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
    for (int j = 0; j < 8; j++) {
      int sc, m;
      k_scale(b.scales, j, sc, m);
      scale[j] = d * sc;
      min[j] = dmin * m;
    }
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
    for (int j = 0; j < 16; j++) scale[j] = d * b.scales[j];
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
