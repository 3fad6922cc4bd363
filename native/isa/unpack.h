// Unpacks a block of 32 weights of a panel to float scales and integers, in registers. The layouts
// are in panel.h.
//
// For block b of the superblock s, and registers of `part`:
//   unpack_scales<T>(s, rows, b, part, u)   scale[h] and min[h] of the groups 4h..4h + 3; without
//                                           halves those of all groups in scale[0], min[0]
//   unpack_half<T, H, Plus>(s, b, part, u, w)   w[k]: the groups 4H + k
//   weight 4 (4H + k) + i of row r = scale * (w[k][4r + i] - start) - min
// where `start` is the offset of a type of small numbers, plus `Plus`, and kBias of others. Half by
// half, so that all of it stays in 16 registers.
#pragma once

#include "bytes.h"
#include "panel.h"

namespace deskside {
namespace {

struct Scales {
  vf scale[2], min[2];
  Bytes raise[2];  // of codebooks: what is added to all weights of a half
  Bytes words[4];  // of IQ4_KSS: the nibbles
};

// What makes the start of a type of small numbers kBias, as the tile has it.
template <Type T> constexpr int kPlus =
    kBias == 0 || Panel<T>::numbers.top == 0 ? 0 : kBias - Panel<T>::numbers.offset;

// A codebook with `plus` added to every value.
template <int N> struct Codebook {
  alignas(16) int8_t t[N];
};
template <int N> constexpr Codebook<N> plus(const int8_t (&values)[N], int plus) {
  Codebook<N> c{};
  for (int i = 0; i < N; i++) c.t[i] = int8_t(uint8_t(values[i] + plus));
  return c;
}
constexpr int8_t kNibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr auto kCodes4 = plus(kCodebook4, kBias);
constexpr auto kCodes5 = plus(kCodebook5, kBias);
constexpr auto kCodes6 = plus(kCodebook6, kBias);
template <int Plus> constexpr auto kFloats4 =
    plus(kE2M1, Panel<Type::MXFP4>::numbers.offset + Plus);
template <int Plus> constexpr auto kWhole4 = plus(kNibbles, Plus);

// Register `part` of the 64 bytes at p.
inline Bytes vector_at(const uint8_t* p, int part) { return load_bytes(p + part * 4 * kLanes); }

// Shifted left by N, or right by -N. Bits cross the borders of bytes within 16.
template <int N> inline Bytes shift(Bytes b) {
  if constexpr (N > 0) return shift_left_16<N>(b);
  if constexpr (N < 0) return shift_right_16<-N>(b);
  return b;
}

// The planes of block b.
template <Type T> inline const uint8_t* planes(const uint8_t* s, int b) {
  using P = Panel<T>;
  return s + P::bytes - (P::blocks - b) * P::bits * kVector;
}

// Of a plane of ones: the bit of each group of half H to bit At. The other bits are noise.
template <int H, int At>
DESKSIDE_INLINE void spread_ones(const uint8_t* p, int part, Bytes (&to)[4]) {
  const Bytes f = vector_at(p, part);
  constexpr int by = At - 4 * H;
  to[0] = shift<by>(f), to[1] = shift<by - 1>(f), to[2] = shift<by - 2>(f);
  to[3] = shift<by - 3>(f);
}

// Of a plane of twos: the bits of each group to At and At + 1.
template <int H, int At>
DESKSIDE_INLINE void spread_twos(const uint8_t* p, int part, Bytes (&to)[4]) {
  const Bytes f = vector_at(p + H * kVector, part);
  to[0] = shift<At>(f), to[1] = shift<At - 2>(f), to[2] = shift<At - 4>(f);
  to[3] = shift<At - 6>(f);
}

// Of a plane of nibbles: those of each group to the low four bits.
template <int H>
DESKSIDE_INLINE void spread_nibbles(const uint8_t* p, int part, Bytes (&to)[4]) {
  for (int k = 0; k < 4; k++) to[k] = shift<H ? -4 : 0>(vector_at(p + k * kVector, part));
}

// The codes q of half H, without noise.
template <Type T, int H>
DESKSIDE_INLINE void unpack_codes(const uint8_t* s, int b, int part, Bytes (&w)[4]) {
  constexpr int bits = Panel<T>::bits;
  constexpr bool ones = bits % 2 == 1, twos = bits == 6;
  const uint8_t* p = planes<T>(s, b);
  if constexpr (bits < 4)
    spread_twos<H, 0>(p + (ones ? kVector : 0), part, w);
  else
    spread_nibbles<H>(p + (ones ? kVector : 0), part, w);
  constexpr int low_bits = bits < 4 ? 3 : 15;
  const Bytes low = splat_byte(low_bits);
  if constexpr (ones || twos) {
    const Bytes high = splat_byte((1 << bits) - 1 - low_bits);
    Bytes top[4];
    if constexpr (ones) spread_ones<H, bits - 1>(p, part, top);
    if constexpr (twos) spread_twos<H, 4>(p + 4 * kVector, part, top);
    for (int k = 0; k < 4; k++) w[k] = join_bits(low, w[k], high, top[k]);
  } else {
    for (Bytes& x : w) x = x & low;
  }
}

// Codes to the values of a codebook of 4, 5 or 6 bits: the fifth and sixth choose among tables.
template <Type T, int H>
DESKSIDE_INLINE void unpack_values(const uint8_t* s, int b, int part, const int8_t* codebook,
                                   Bytes (&w)[4]) {
  constexpr int bits = Panel<T>::bits;
  const uint8_t* p = planes<T>(s, b);
  const Bytes low = splat_byte(15);
  spread_nibbles<H>(p + (bits == 5 ? kVector : 0), part, w);
  for (Bytes& x : w) x = x & low;
  Bytes table[1 << (bits - 4)], fifth[4], sixth[4];
  for (int i = 0; i < 1 << (bits - 4); i++) table[i] = table_16(codebook + 16 * i);
  if constexpr (bits == 4) {
    for (Bytes& x : w) x = look_up(table[0], x);
  } else if constexpr (bits == 5) {
    spread_ones<H, 7>(p, part, fifth);
    for (int k = 0; k < 4; k++) w[k] = look_up_either(fifth[k], table[1], table[0], w[k]);
  } else {
    spread_twos<H, 7>(p + 4 * kVector, part, fifth);
    spread_twos<H, 6>(p + 4 * kVector, part, sixth);
    for (int k = 0; k < 4; k++)
      w[k] = choose(sixth[k], look_up_either(fifth[k], table[3], table[2], w[k]),
                    look_up_either(fifth[k], table[1], table[0], w[k]));
  }
}

inline vf halves_at(const uint8_t* p, int part) { return load_f16(p + part * 2 * kLanes); }
inline Bytes bytes_at(const uint8_t* p, int part) { return widen_u8(p + part * kLanes); }
inline Bytes words_at(const uint8_t* p, int part) { return widen_u16(p + part * 2 * kLanes); }
inline Bytes shift_left_lane(Bytes b, int n) { return (Bytes)((vi)b << n); }

// The 6-bit scale and minimum of block b of Q4_K and Q5_K (docs/MODEL.md), as floats in lanes. A
// row's 12 bytes are three words u0, u1, u2, which are 64 bytes apart.
DESKSIDE_INLINE void k_scales(const uint8_t* p, int part, int b, vf& scale, vf& min) {
  const Bytes six = splat_lane(63), four = splat_lane(15);
  const Bytes u0 = vector_at(p, part), u1 = vector_at(p + kVector, part),
              u2 = vector_at(p + 2 * kVector, part);
  if (b < 4) {
    scale = to_float(shift_right_lane(u0, 8 * b) & six);
    min = to_float(shift_right_lane(u1, 8 * b) & six);
    return;
  }
  const int j = 8 * (b - 4);
  // Two bits move to bits 4 and 5: (u >> (j + 6) & 3) << 4 = u >> (j + 2) & 48.
  const Bytes top = splat_lane(48);
  scale = to_float((shift_right_lane(u2, j) & four) | (shift_right_lane(u0, j + 2) & top));
  min = to_float((shift_right_lane(u2, j + 4) & four) | (shift_right_lane(u1, j + 2) & top));
}

// The 6-bit scales of both halves of block b of Q3_K, IQ4_K and IQ5_K, as floats in lanes. `high`
// is four arrays of bytes with the high bits; eight arrays with the low bits follow.
DESKSIDE_INLINE void six_bit_scales(const uint8_t* high, int part, int b, vf* scale) {
  const Bytes four = splat_lane(15), two = splat_lane(48);
  const Bytes low = bytes_at(high + (4 + b) * kPanelRows, part);
  const Bytes top = shift_right_lane(bytes_at(high + b / 2 * kPanelRows, part), b % 2 * 4);
  scale[0] = to_float((low & four) | (shift_left_lane(top, 4) & two)) - 32.0f;
  scale[1] = to_float(shift_right_lane(low, 4) | (shift_left_lane(top, 2) & two)) - 32.0f;
}

// Where bits 2b and 2b + 1 of the words `extra` are set, the codebook values of the halves of block
// b are `Shift` higher.
template <int Shift>
DESKSIDE_INLINE void raise_halves(const uint8_t* extra, int part, int b, Bytes (&raise)[2]) {
  const vi bits = (vi)shift_right_lane(words_at(extra, part), 2 * b);
  raise[0] = repeat_byte((Bytes)((bits & 1) * Shift));
  raise[1] = repeat_byte((Bytes)((bits >> 1 & 1) * Shift));
}

// The scale bytes s of IQ4_KS, IQ5_KS and IQ4_KSS, in lanes. The scale is (s & 254) - 127. If bit 0
// is set, all codebook values are `Shift` higher.
template <int Shift>
DESKSIDE_INLINE void ks_scale(Bytes s, const uint8_t* rows, int part, Scales& u) {
  const vf row = load(reinterpret_cast<const float*>(rows) + part * kLanes);
  u.scale[0] = row * (to_float(s & splat_lane(254)) - 127.0f);
  u.raise[0] = u.raise[1] = repeat_byte((Bytes)(((vi)s & 1) * Shift));
}

// 2^(e - 128) in lanes; below 2^-126 it has no exponent of its own.
DESKSIDE_INLINE vf power_of_two(Bytes e) {
  const vi n = (vi)e, small = (n + 1) << 21;
  return (vf)(n < 2 ? small : (n - 1) << 23);
}

template <Type T>
DESKSIDE_INLINE void unpack_scales(const uint8_t* s, const uint8_t* rows, int b, int part,
                                   Scales& u) {
  (void)rows, (void)b;
  constexpr int k8 = kPanelRows, k16 = 2 * kPanelRows;  // bytes of 16 bytes, of 16 halves
  if constexpr (T == Type::MXFP4) {
    u.scale[0] = power_of_two(bytes_at(s, part));
  } else if constexpr (T == Type::Q4_1 || T == Type::Q5_1) {
    u.scale[0] = halves_at(s, part);
    u.min[0] = -halves_at(s + k16, part);
  } else if constexpr (Panel<T>::blocks == 1) {
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q2_K) {
    const vf d = halves_at(s, part), dmin = halves_at(s + k16, part);
    for (int h = 0; h < 2; h++) {
      const Bytes both = bytes_at(s + 2 * k16 + (2 * b + h) * k8, part);
      u.scale[h] = d * to_float(both & splat_lane(15));
      u.min[h] = dmin * to_float(shift_right_lane(both, 4));
    }
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    k_scales(s + 2 * k16, part, b, u.scale[0], u.min[0]);
    u.scale[0] *= halves_at(s, part);
    u.min[0] *= halves_at(s + k16, part);
  } else if constexpr (T == Type::Q6_K || T == Type::IQ6_K) {
    constexpr int scales = T == Type::Q6_K ? k16 : 2 * k16;
    const vf d = halves_at(s, part);
    const auto* scale = reinterpret_cast<const int8_t*>(s + scales) + part * kLanes;
    for (int h = 0; h < 2; h++) u.scale[h] = d * load_int8(scale + (2 * b + h) * k8);
    if constexpr (T == Type::IQ6_K) raise_halves<kShift6>(s + k16, part, b, u.raise);
  } else if constexpr (T == Type::Q3_K || T == Type::IQ4_K || T == Type::IQ5_K) {
    six_bit_scales(s + (T == Type::Q3_K ? k16 : 2 * k16), part, b, u.scale);
    const vf d = halves_at(s, part);
    for (vf& scale : u.scale) scale *= d;
    if constexpr (T == Type::IQ4_K) raise_halves<kShift4>(s + k16, part, b, u.raise);
    if constexpr (T == Type::IQ5_K) raise_halves<kShift5>(s + k16, part, b, u.raise);
  } else if constexpr (T == Type::IQ4_XS) {
    const Bytes low = shift_right_lane(vector_at(s + 2 * k16, part), 4 * b) & splat_lane(15);
    const Bytes high = shift_right_lane(words_at(s + k16, part), 2 * b) & splat_lane(3);
    u.scale[0] = halves_at(s, part) * (to_float(low | shift_left_lane(high, 4)) - 32.0f);
  } else if constexpr (T == Type::IQ4_KS) {
    ks_scale<kShift4>(bytes_at(s + b * k8, part), rows, part, u);
  } else if constexpr (T == Type::IQ5_KS) {
    ks_scale<kShift5>(bytes_at(s + b * k8, part), rows, part, u);
  } else {
    static_assert(T == Type::IQ4_KSS);
    // Bit 0 of word k is bit k of the scale. Words 2j and 2j + 1 are a lane's low and high half.
    const Bytes each = splat_lane(0x00010001);
    vi bits = vi{};
    for (int j = 0; j < 4; j++) {
      const Bytes x = vector_at(planes<T>(s, b) + j * kVector, part);
      const Bytes even = x & each;
      bits |= (vi)even << (2 * j);
      // The other 15 bits, xored with themselves shifted by one, are four nibbles.
      const Bytes v = x ^ even;
      u.words[j] = v ^ shift_right_16<1>(v);
    }
    const Bytes scales = ((Bytes)bits | shift_right_lane((Bytes)bits, 15)) & splat_lane(255);
    ks_scale<kShift4>(scales, rows, part, u);
  }
}

template <Type T, int H, int Plus>
DESKSIDE_INLINE void unpack_half(const uint8_t* s, int b, int part, const Scales& u,
                                 Bytes (&w)[4]) {
  constexpr bool raised = T == Type::IQ4_K || T == Type::IQ5_K || T == Type::IQ6_K ||
                          T == Type::IQ4_KS || T == Type::IQ5_KS || T == Type::IQ4_KSS;
  if constexpr (T == Type::Q8_0) {
    for (int k = 0; k < 4; k++) {
      w[k] = vector_at(planes<T>(s, b) + (4 * H + k) * kVector, part);
      if constexpr (kBias != 0) w[k] = w[k] ^ splat_byte(kBias);  // adds 128
    }
  } else if constexpr (T == Type::IQ4_KSS) {
    const Bytes low = splat_byte(15), table = table_16(kCodes4.t);
    for (int k = 0; k < 4; k++) w[k] = look_up(table, shift<H ? -4 : 0>(u.words[k]) & low);
  } else if constexpr (T == Type::MXFP4) {
    unpack_values<T, H>(s, b, part, kFloats4<Plus>.t, w);
  } else if constexpr (Panel<T>::numbers.top == 15 && Plus != 0) {
    unpack_values<T, H>(s, b, part, kWhole4<Plus>.t, w);  // a table costs no addition
  } else if constexpr (Panel<T>::numbers.top != 0) {
    unpack_codes<T, H>(s, b, part, w);
    if constexpr (Plus != 0)
      for (Bytes& x : w) x = add_bytes(x, splat_byte(Plus));
  } else {
    constexpr const int8_t* codebook = Panel<T>::bits == 4   ? kCodes4.t
                                       : Panel<T>::bits == 5 ? kCodes5.t
                                                             : kCodes6.t;
    unpack_values<T, H>(s, b, part, codebook, w);
  }
  if constexpr (raised)
    for (Bytes& x : w) x = add_bytes(x, u.raise[H]);
}

}  // namespace
}  // namespace deskside
