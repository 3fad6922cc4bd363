// A block of 32 weights of a panel to integers and float scales, in registers (layouts: panel.h).
//
// unpack<T>(s, rows, b, part, u): block b of the superblock s, registers of `part`:
//   weight 4g + i of row r = scale * (u.w[g][4r + i] - start) - min
// where `start` is kBias; without one (kBias == 0) it is the type's offset. Where the type has
// halves, scale[1] and min[1] are those of the groups 4..7; otherwise only the first are set.
#pragma once

#include "bytes.h"
#include "panel.h"

namespace deskside {
namespace {

struct Unpacked {
  Bytes w[8];
  vf scale[2], min[2];
};

// What unpacking adds to the numbers q of a type.
template <Type T> constexpr int kPlus = kBias == 0 ? 0 : kBias - Panel<T>::numbers.offset;

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
constexpr auto kFloats4 = plus(kE2M1, Panel<Type::MXFP4>::numbers.offset + kPlus<Type::MXFP4>);
template <Type T> constexpr auto kWhole4 = plus(kNibbles, kPlus<T>);

// A register's share of 64 bytes at p.
inline Bytes vector_at(const uint8_t* p, int part) { return load_bytes(p + part * 4 * kLanes); }

// Shifted left by N, or right by -N. Bits cross the borders of bytes within 16.
template <int N> inline Bytes shift(Bytes b) {
  if constexpr (N > 0) return shift_left_16<N>(b);
  if constexpr (N < 0) return shift_right_16<-N>(b);
  return b;
}

// A plane of ones: the bit of each group to bit At. The other bits are noise.
template <int At> DESKSIDE_INLINE void spread_ones(const uint8_t* p, int part, Bytes* to) {
  const Bytes f = vector_at(p, part);
  to[0] = shift<At>(f), to[1] = shift<At - 1>(f), to[2] = shift<At - 2>(f);
  to[3] = shift<At - 3>(f), to[4] = shift<At - 4>(f), to[5] = shift<At - 5>(f);
  to[6] = shift<At - 6>(f), to[7] = shift<At - 7>(f);
}

// A plane of twos: the bits of each group to At and At + 1.
template <int At> DESKSIDE_INLINE void spread_twos(const uint8_t* p, int part, Bytes* to) {
  for (int h = 0; h < 2; h++, to += 4) {
    const Bytes f = vector_at(p + h * kVector, part);
    to[0] = shift<At>(f), to[1] = shift<At - 2>(f);
    to[2] = shift<At - 4>(f), to[3] = shift<At - 6>(f);
  }
}

// A plane of nibbles: those of each group to the low four bits.
DESKSIDE_INLINE void spread_nibbles(const uint8_t* p, int part, Bytes* to) {
  for (int j = 0; j < 4; j++) {
    to[j] = vector_at(p + j * kVector, part);
    to[j + 4] = shift_right_16<4>(to[j]);
  }
}

// Masks what is noise, and adds.
template <int Plus> DESKSIDE_INLINE void finish(int mask, Bytes* w) {
  const Bytes valid = splat_byte(mask), plus = splat_byte(Plus);
  for (int g = 0; g < 8; g++) {
    w[g] = w[g] & valid;
    if constexpr (Plus != 0) w[g] = add_bytes(w[g], plus);
  }
}

DESKSIDE_INLINE void unpack_nibbles(const uint8_t* p, int part, Bytes table, Bytes* w) {
  const Bytes low = splat_byte(15);
  spread_nibbles(p, part, w);
  for (int g = 0; g < 8; g++) w[g] = look_up(table, w[g] & low);
}

// The numbers of nibbles, plus what the type needs.
template <Type T> DESKSIDE_INLINE void unpack_fours(const uint8_t* p, int part, Bytes* w) {
  if constexpr (kPlus<T> == 0) {
    spread_nibbles(p, part, w);
    finish<0>(15, w);
  } else {
    unpack_nibbles(p, part, table_16(kWhole4<T>.t), w);
  }
}

template <Type T> DESKSIDE_INLINE void unpack_threes(const uint8_t* ones, const uint8_t* twos,
                                                     int part, Bytes* w) {
  const Bytes low = splat_byte(3);
  Bytes high[8];
  spread_ones<2>(ones, part, high);
  spread_twos<0>(twos, part, w);
  for (int g = 0; g < 8; g++) w[g] = choose_bits(low, w[g], high[g]);
  finish<kPlus<T>>(7, w);
}

template <Type T> DESKSIDE_INLINE void unpack_fives(const uint8_t* ones, const uint8_t* nibbles,
                                                    int part, Bytes* w) {
  const Bytes low = splat_byte(15);
  Bytes high[8];
  spread_ones<4>(ones, part, high);
  spread_nibbles(nibbles, part, w);
  for (int g = 0; g < 8; g++) w[g] = choose_bits(low, w[g], high[g]);
  finish<kPlus<T>>(31, w);
}

template <Type T> DESKSIDE_INLINE void unpack_sixes(const uint8_t* nibbles, const uint8_t* twos,
                                                    int part, Bytes* w) {
  const Bytes low = splat_byte(15);
  Bytes high[8];
  spread_twos<4>(twos, part, high);
  spread_nibbles(nibbles, part, w);
  for (int g = 0; g < 8; g++) w[g] = choose_bits(low, w[g], high[g]);
  finish<kPlus<T>>(63, w);
}

// A table of 32 or 64 values: look_up gives 0 where bit 7 of the index is set, and takes no notice
// of bits 4 to 6. So the fifth bit of a code, moved to bit 7, empties one of two tables.
DESKSIDE_INLINE void unpack_codes_5(const uint8_t* ones, const uint8_t* nibbles, int part,
                                    Bytes* w) {
  const Bytes low = splat_byte(15), other = splat_byte(-128);
  const Bytes table[2] = {table_16(kCodes5.t), table_16(kCodes5.t + 16)};
  Bytes high[8];
  spread_ones<7>(ones, part, high);
  spread_nibbles(nibbles, part, w);
  for (int g = 0; g < 8; g++) {
    const Bytes index = choose_bits(low, w[g], high[g]);
    w[g] = look_up(table[0], index) | look_up(table[1], index ^ other);
  }
}

DESKSIDE_INLINE void unpack_codes_6(const uint8_t* nibbles, const uint8_t* twos, int part,
                                    Bytes* w) {
  const Bytes low = splat_byte(15), other = splat_byte(-128);
  const Bytes table[4] = {table_16(kCodes6.t), table_16(kCodes6.t + 16), table_16(kCodes6.t + 32),
                          table_16(kCodes6.t + 48)};
  Bytes fifth[8], sixth[8];
  spread_twos<7>(twos, part, fifth);
  spread_twos<6>(twos, part, sixth);
  spread_nibbles(nibbles, part, w);
  for (int g = 0; g < 8; g++) {
    const Bytes even = choose_bits(low, w[g], fifth[g]), odd = even ^ other;
    w[g] = choose(sixth[g], look_up(table[2], even) | look_up(table[3], odd),
                  look_up(table[0], even) | look_up(table[1], odd));
  }
}

inline vf halves_at(const uint8_t* p, int part) { return load_f16(p + part * 2 * kLanes); }
inline Bytes bytes_at(const uint8_t* p, int part) { return widen_u8(p + part * kLanes); }
inline Bytes words_at(const uint8_t* p, int part) { return widen_u16(p + part * 2 * kLanes); }
inline Bytes shift_left_lane(Bytes b, int n) { return (Bytes)((vi)b << n); }

// Lanes of the 6-bit scale and minimum of block b of Q4_K and Q5_K (docs/MODEL.md). The words u0,
// u1, u2 of a row's 12 bytes are 64 bytes apart.
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
  // Two bits to bit 4 and 5: (u >> (j + 6) & 3) << 4 = u >> (j + 2) & 48.
  const Bytes top = splat_lane(48);
  scale = to_float((shift_right_lane(u2, j) & four) | (shift_right_lane(u0, j + 2) & top));
  min = to_float((shift_right_lane(u2, j + 4) & four) | (shift_right_lane(u1, j + 2) & top));
}

// Lanes of the 6-bit scales of block b of Q3_K, both halves. The words u0, u1, u2 as above.
DESKSIDE_INLINE void q3_scales(const uint8_t* p, int part, int b, vf* scale) {
  const Bytes four = splat_lane(15), two = splat_lane(48);
  const Bytes low = vector_at(p + b % 4 / 2 * kVector, part),
              high = vector_at(p + 2 * kVector, part);
  for (int h = 0; h < 2; h++) {
    const int byte = 8 * (2 * b % 4 + h), pair = byte + b / 2 * 2;  // places of low and high bits
    const Bytes top = pair < 4 ? shift_left_lane(high, 4 - pair) : shift_right_lane(high, pair - 4);
    scale[h] = to_float((shift_right_lane(low, byte + b / 4 * 4) & four) | (top & two)) - 32.0f;
  }
}

// The same of IQ4_K and IQ5_K: `high` are four arrays of bytes, then there are eight of low bits.
DESKSIDE_INLINE void ik_scales(const uint8_t* high, int part, int b, vf* scale) {
  const Bytes four = splat_lane(15), two = splat_lane(48);
  const Bytes low = bytes_at(high + (4 + b) * kPanelRows, part);
  const Bytes top = shift_right_lane(bytes_at(high + b / 2 * kPanelRows, part), b % 2 * 4);
  scale[0] = to_float((low & four) | (shift_left_lane(top, 4) & two)) - 32.0f;
  scale[1] = to_float(shift_right_lane(low, 4) | (shift_left_lane(top, 2) & two)) - 32.0f;
}

// Adds one number a row, below 256, to the weights of n groups.
DESKSIDE_INLINE void raise(Bytes lanes, Bytes* w, int n) {
  const Bytes number = repeat_byte(lanes);
  for (int g = 0; g < n; g++) w[g] = add_bytes(w[g], number);
}

// Where bits 2b and 2b + 1 of the words `extra` are set, the codebook values of the halves of block
// b are `Shift` higher.
template <int Shift>
DESKSIDE_INLINE void raise_halves(const uint8_t* extra, int part, int b, Bytes* w) {
  const vi bits = (vi)shift_right_lane(words_at(extra, part), 2 * b);
  raise((Bytes)((bits & 1) * Shift), w, 4);
  raise((Bytes)((bits >> 1 & 1) * Shift), w + 4, 4);
}

// Scale bytes s of IQ4_KS, IQ5_KS and IQ4_KSS in lanes: scale (s & 254) - 127, and where bit 0 is
// set all codebook values are `Shift` higher.
template <int Shift> DESKSIDE_INLINE void ks_scale(Bytes s, const uint8_t* rows, int part,
                                                   Unpacked& u) {
  const vf row = load(reinterpret_cast<const float*>(rows) + part * kLanes);
  u.scale[0] = row * (to_float(s & splat_lane(254)) - 127.0f);
  raise((Bytes)(((vi)s & 1) * Shift), u.w, 8);
}

// 2^(e - 128) in lanes; below 2^-126 it has no exponent of its own.
DESKSIDE_INLINE vf power_of_two(Bytes e) {
  const vi n = (vi)e, small = (n + 1) << 21;
  return (vf)(n < 2 ? small : (n - 1) << 23);
}

template <Type T> DESKSIDE_INLINE void unpack(const uint8_t* s, const uint8_t* rows, int b,
                                              int part, Unpacked& u) {
  (void)rows, (void)b;
  constexpr int k8 = kPanelRows, k16 = 2 * kPanelRows;  // bytes of 16 bytes, of 16 halves
  constexpr int ones = kVector, twos = 2 * kVector, nibbles = 4 * kVector;
  if constexpr (T == Type::IQ4_NL) {
    unpack_nibbles(s + k16, part, table_16(kCodes4.t), u.w);
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::MXFP4) {
    unpack_nibbles(s + k8, part, table_16(kFloats4.t), u.w);
    u.scale[0] = power_of_two(bytes_at(s, part));
  } else if constexpr (T == Type::Q4_0) {
    unpack_fours<T>(s + k16, part, u.w);
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q4_1) {
    unpack_fours<T>(s + 2 * k16, part, u.w);
    u.scale[0] = halves_at(s, part);
    u.min[0] = -halves_at(s + k16, part);
  } else if constexpr (T == Type::Q5_0) {
    unpack_fives<T>(s + k16, s + k16 + ones, part, u.w);
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q5_1) {
    unpack_fives<T>(s + 2 * k16, s + 2 * k16 + ones, part, u.w);
    u.scale[0] = halves_at(s, part);
    u.min[0] = -halves_at(s + k16, part);
  } else if constexpr (T == Type::Q6_0) {
    unpack_sixes<T>(s + k16, s + k16 + nibbles, part, u.w);
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q8_0) {
    const Bytes bias = splat_byte(kBias);
    for (int g = 0; g < 8; g++) {
      u.w[g] = vector_at(s + k16 + g * kVector, part);
      if constexpr (kBias != 0) u.w[g] = u.w[g] ^ bias;  // adds 128
    }
    u.scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q2_K) {
    spread_twos<0>(s + 2 * k16 + 16 * k8 + b * twos, part, u.w);
    finish<kPlus<T>>(3, u.w);
    const vf d = halves_at(s, part), dmin = halves_at(s + k16, part);
    for (int h = 0; h < 2; h++) {
      const Bytes both = bytes_at(s + 2 * k16 + (2 * b + h) * k8, part);
      u.scale[h] = d * to_float(both & splat_lane(15));
      u.min[h] = dmin * to_float(shift_right_lane(both, 4));
    }
  } else if constexpr (T == Type::Q3_K) {
    const uint8_t* data = s + k16 + 3 * kVector + b * (ones + twos);
    unpack_threes<T>(data, data + ones, part, u.w);
    q3_scales(s + k16, part, b, u.scale);
    const vf d = halves_at(s, part);
    for (vf& scale : u.scale) scale *= d;
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const uint8_t* data = s + 2 * k16 + 3 * kVector;
    if constexpr (T == Type::Q4_K)
      unpack_fours<T>(data + b * nibbles, part, u.w);
    else
      unpack_fives<T>(data + b * (ones + nibbles), data + b * (ones + nibbles) + ones, part, u.w);
    k_scales(s + 2 * k16, part, b, u.scale[0], u.min[0]);
    u.scale[0] *= halves_at(s, part);
    u.min[0] *= halves_at(s + k16, part);
  } else if constexpr (T == Type::Q6_K || T == Type::IQ6_K) {
    constexpr int scales = T == Type::Q6_K ? k16 : 2 * k16;
    const uint8_t* data = s + scales + 16 * k8 + b * (nibbles + twos);
    if constexpr (T == Type::Q6_K)
      unpack_sixes<T>(data, data + nibbles, part, u.w);
    else
      unpack_codes_6(data, data + nibbles, part, u.w);
    if constexpr (T == Type::IQ6_K) raise_halves<kShift6>(s + k16, part, b, u.w);
    const vf d = halves_at(s, part);
    const auto* scale = reinterpret_cast<const int8_t*>(s + scales) + part * kLanes;
    for (int h = 0; h < 2; h++) u.scale[h] = d * load_int8(scale + (2 * b + h) * k8);
  } else if constexpr (T == Type::IQ4_K || T == Type::IQ5_K) {
    const uint8_t* data = s + 2 * k16 + 12 * k8;
    if constexpr (T == Type::IQ4_K) {
      unpack_nibbles(data + b * nibbles, part, table_16(kCodes4.t), u.w);
      raise_halves<kShift4>(s + k16, part, b, u.w);
    } else {
      data += b * (ones + nibbles);
      unpack_codes_5(data, data + ones, part, u.w);
      raise_halves<kShift5>(s + k16, part, b, u.w);
    }
    ik_scales(s + 2 * k16, part, b, u.scale);
    const vf d = halves_at(s, part);
    for (vf& scale : u.scale) scale *= d;
  } else if constexpr (T == Type::IQ4_XS) {
    unpack_nibbles(s + 2 * k16 + kVector + b * nibbles, part, table_16(kCodes4.t), u.w);
    const Bytes low = shift_right_lane(vector_at(s + 2 * k16, part), 4 * b) & splat_lane(15);
    const Bytes high = shift_right_lane(words_at(s + k16, part), 2 * b) & splat_lane(3);
    u.scale[0] = halves_at(s, part) * (to_float(low | shift_left_lane(high, 4)) - 32.0f);
  } else if constexpr (T == Type::IQ4_KS) {
    unpack_nibbles(s + 8 * k8 + b * nibbles, part, table_16(kCodes4.t), u.w);
    ks_scale<kShift4>(bytes_at(s + b * k8, part), rows, part, u);
  } else if constexpr (T == Type::IQ5_KS) {
    const uint8_t* data = s + 8 * k8 + b * (ones + nibbles);
    unpack_codes_5(data, data + ones, part, u.w);
    ks_scale<kShift5>(bytes_at(s + b * k8, part), rows, part, u);
  } else {
    static_assert(T == Type::IQ4_KSS);
    // Bit 0 of word k is bit k of the scale: the words 2j and 2j + 1 are a lane's low and high
    // half.
    const Bytes each = splat_lane(0x00010001), low = splat_byte(15), table = table_16(kCodes4.t);
    vi bits = vi{};
    for (int j = 0; j < 4; j++) {
      const Bytes x = vector_at(s + b * nibbles + j * kVector, part);
      const Bytes even = x & each;
      bits |= (vi)even << (2 * j);
      // The other 15 bits, xored with themselves shifted by one, are four nibbles.
      const Bytes v = x ^ even, n = v ^ shift_right_16<1>(v);
      u.w[j] = look_up(table, n & low);
      u.w[j + 4] = look_up(table, shift_right_16<4>(n) & low);
    }
    const Bytes scales = ((Bytes)bits | shift_right_lane((Bytes)bits, 15)) & splat_lane(255);
    ks_scale<kShift4>(scales, rows, part, u);
  }
}

}  // namespace
}  // namespace deskside
