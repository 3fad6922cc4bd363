// Unpacks a block of 32 weights of a panel to integers and float scales, in registers. The layouts
// are in panel.h.
//
// unpack<T>(s, rows, b, part, w, scale, min): block b of the superblock s, registers of `part`:
//   weight 4g + i of row r = scale * (w[g][4r + i] - kBias) - min
// If Panel<T>::halves, scale[1] is the scale of the groups 4..7; otherwise only scale[0] is set.
#pragma once

#include "bytes.h"
#include "panel.h"

namespace deskside {
namespace {

struct Codebooks {
  alignas(16) int8_t t[3][16];
};
// Three tables, each with this instruction set's bias: IQ4_NL's codebook, -8..7, and 0..15.
constexpr Codebooks biased_codebooks() {
  Codebooks c{};
  for (int i = 0; i < 16; i++) {
    c.t[0][i] = int8_t(uint8_t(kCodebook[0][i] + kBias));
    c.t[1][i] = int8_t(uint8_t(i - 8 + kBias));
    c.t[2][i] = int8_t(uint8_t(i + kBias));
  }
  return c;
}
constexpr Codebooks kTables = biased_codebooks();

// Register `part` of the 64 bytes at p.
inline Bytes vector_at(const uint8_t* p, int part) { return load_bytes(p + part * 4 * kLanes); }

DESKSIDE_INLINE void unpack_nibbles(const uint8_t* p, int part, Bytes table, Bytes* w) {
  const Bytes low = splat_byte(15);
  for (int j = 0; j < 4; j++) {
    const Bytes x = vector_at(p + j * kVector, part);
    w[j] = look_up(table, x & low);
    w[j + 4] = look_up(table, shift_right_16<4>(x) & low);
  }
}

// Nibbles with a fifth bit, plus `offset`.
DESKSIDE_INLINE void unpack_fives(const uint8_t* fifth, const uint8_t* nibbles, int part,
                                  int offset, Bytes* w) {
  const Bytes low = splat_byte(15), bit = splat_byte(16), off = splat_byte(offset);
  const Bytes f = vector_at(fifth, part);
  // Shifts bit g to bit 4. Bits that cross a byte's border are masked out below.
  const Bytes high[8] = {
      shift_left_16<4>(f),  shift_left_16<3>(f),  shift_left_16<2>(f), shift_left_16<1>(f), f,
      shift_right_16<1>(f), shift_right_16<2>(f), shift_right_16<3>(f)};
  for (int j = 0; j < 4; j++) {
    const Bytes x = vector_at(nibbles + j * kVector, part);
    w[j] = add_bytes((x & low) | (high[j] & bit), off);
    w[j + 4] = add_bytes((shift_right_16<4>(x) & low) | (high[j + 4] & bit), off);
  }
}

DESKSIDE_INLINE void unpack_sixes(const uint8_t* p, int part, Bytes* w) {
  const Bytes low = splat_byte(15), two = splat_byte(48), off = splat_byte(kBias - 32);
  Bytes high[8];
  for (int h = 0; h < 2; h++) {
    const Bytes f = vector_at(p + (4 + h) * kVector, part);
    high[4 * h] = shift_left_16<4>(f);
    high[4 * h + 1] = shift_left_16<2>(f);
    high[4 * h + 2] = f;
    high[4 * h + 3] = shift_right_16<2>(f);
  }
  for (int j = 0; j < 4; j++) {
    const Bytes x = vector_at(p + j * kVector, part);
    w[j] = add_bytes((x & low) | (high[j] & two), off);
    w[j + 4] = add_bytes((shift_right_16<4>(x) & low) | (high[j + 4] & two), off);
  }
}

inline vf halves_at(const uint8_t* p, int part) { return load_f16(p + part * 2 * kLanes); }

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

// The scale bytes s of IQ4_KS and IQ4_KSS, in lanes. The scale is (s & 254) - 127. If bit 0 is set,
// all codebook values are 4 higher.
DESKSIDE_INLINE void ks_scale(Bytes s, vf row, vf& scale, Bytes* w) {
  scale = row * (to_float(s & splat_lane(254)) - 127.0f);
  const Bytes shift = repeat_byte((Bytes)((vi)(s & splat_lane(1)) << 2));
  for (int g = 0; g < 8; g++) w[g] = add_bytes(w[g], shift);
}

template <Type T>
DESKSIDE_INLINE void unpack(const uint8_t* s, const uint8_t* rows, int b, int part, Bytes* w,
                            vf* scale, vf& min) {
  (void)rows, (void)min, (void)b;
  constexpr int k16 = 2 * kPanelRows;  // bytes of 16 halves
  if constexpr (T == Type::IQ4_NL || T == Type::Q4_0) {
    unpack_nibbles(s + k16, part, table_16(kTables.t[T == Type::Q4_0]), w);
    scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q4_1) {
    unpack_nibbles(s + 2 * k16, part, table_16(kTables.t[2]), w);
    scale[0] = halves_at(s, part);
    min = -halves_at(s + k16, part);
  } else if constexpr (T == Type::Q5_0) {
    unpack_fives(s + k16, s + k16 + kVector, part, kBias - 16, w);
    scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q5_1) {
    unpack_fives(s + 2 * k16, s + 2 * k16 + kVector, part, kBias, w);
    scale[0] = halves_at(s, part);
    min = -halves_at(s + k16, part);
  } else if constexpr (T == Type::Q8_0) {
    const Bytes bias = splat_byte(kBias);
    for (int g = 0; g < 8; g++) {
      w[g] = vector_at(s + k16 + g * kVector, part);
      if constexpr (kBias != 0) w[g] = w[g] ^ bias;  // adds 128
    }
    scale[0] = halves_at(s, part);
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const uint8_t* data = s + 2 * k16 + 3 * kVector;
    if constexpr (T == Type::Q4_K)
      unpack_nibbles(data + b * 4 * kVector, part, table_16(kTables.t[2]), w);
    else
      unpack_fives(data + b * 5 * kVector, data + b * 5 * kVector + kVector, part, kBias, w);
    k_scales(s + 2 * k16, part, b, scale[0], min);
    scale[0] *= halves_at(s, part);
    min *= halves_at(s + k16, part);
  } else if constexpr (T == Type::Q6_K) {
    unpack_sixes(s + k16 + 16 * kPanelRows + b * 6 * kVector, part, w);
    const vf d = halves_at(s, part);
    for (int h = 0; h < 2; h++)
      scale[h] = d * load_int8(reinterpret_cast<const int8_t*>(s) + k16 + (2 * b + h) * kPanelRows +
                               part * kLanes);
  } else if constexpr (T == Type::IQ4_XS) {
    unpack_nibbles(s + 2 * k16 + kVector + b * 4 * kVector, part, table_16(kTables.t[0]), w);
    const Bytes low = shift_right_lane(vector_at(s + 2 * k16, part), 4 * b) & splat_lane(15);
    const Bytes high =
        shift_right_lane(widen_u16(s + k16 + part * 2 * kLanes), 2 * b) & splat_lane(3);
    scale[0] = halves_at(s, part) * (to_float(low | (Bytes)((vi)high << 4)) - 32.0f);
  } else if constexpr (T == Type::IQ4_KS) {
    unpack_nibbles(s + 8 * kPanelRows + b * 4 * kVector, part, table_16(kTables.t[0]), w);
    ks_scale(widen_u8(s + b * kPanelRows + part * kLanes),
             load(reinterpret_cast<const float*>(rows) + part * kLanes), scale[0], w);
  } else {
    static_assert(T == Type::IQ4_KSS);
    // Bit 0 of word k is bit k of the scale. Words 2j and 2j + 1 are a lane's low and high half.
    const Bytes ones = splat_lane(0x00010001), low = splat_byte(15), table = table_16(kTables.t[0]);
    vi bits = vi{};
    for (int j = 0; j < 4; j++) {
      const Bytes x = vector_at(s + b * 4 * kVector + j * kVector, part);
      const Bytes even = x & ones;
      bits |= (vi)even << (2 * j);
      // The other 15 bits, xored with themselves shifted right by one, are four nibbles.
      const Bytes v = x ^ even, n = v ^ shift_right_16<1>(v);
      w[j] = look_up(table, n & low);
      w[j + 4] = look_up(table, shift_right_16<4>(n) & low);
    }
    const Bytes scales = ((Bytes)bits | shift_right_lane((Bytes)bits, 15)) & splat_lane(255);
    ks_scale(scales, load(reinterpret_cast<const float*>(rows) + part * kLanes), scale[0], w);
  }
}

}  // namespace
}  // namespace deskside
