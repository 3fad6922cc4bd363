// The layout of packed weights in memory: panels of 16 rows, the same for all instruction sets.
//
// A panel has 16 rows of a matrix, block after block along the row, in as many bytes as in the
// file. Within a block of 32 weights, the rows are interleaved, four weights at a time. Group g is
// the weights 4g..4g+3. So one register of activations multiplies 16 rows, and no sum runs across
// lanes. Bytes 4r to 4r + 3 of a vector belong to row r:
//
//   nibbles   4 x 64 bytes; vector j: byte 4r + i has weights 4j + i (low), 16 + 4j + i (high)
//   bytes     8 x 64 bytes; vector g: byte 4r + i has weight 4g + i
//   fifth     64 bytes;     byte 4r + i, bit g: fifth bit of weight 4g + i
//   top two   2 x 64 bytes; vector g / 4, bits 2 (g % 4): bits 4 and 5 of weight 4g + i
//
// Superblocks of 16 rows, field by field (sizes in bytes, all arrays over the 16 rows):
//   Q4_0 IQ4_NL      d f16[16], nibbles                                              288 = 16 * 18
//   Q4_1             d, m f16[16], nibbles                                           320 = 16 * 20
//   Q5_0             d f16[16], fifth, nibbles                                       352 = 16 * 22
//   Q5_1             d, m f16[16], fifth, nibbles                                    384 = 16 * 24
//   Q8_0             d f16[16], bytes                                                544 = 16 * 34
//   Q4_K             d, dmin f16[16], 3 x u32[16] of the 6-bit scales, 8 x nibbles  2304 = 16 * 144
//   Q5_K             the same, 8 x (fifth, nibbles)                                 2816 = 16 * 176
//   Q6_K             d f16[16], 16 x i8[16] scales, 8 x (nibbles, top two)          3360 = 16 * 210
//   IQ4_XS           d, scales_h u16[16], scales_l u32[16], 8 x nibbles             2176 = 16 * 136
//   IQ4_KS           8 x u8[16] scales, 8 x nibbles                                 2176 = 16 * 136
//   IQ4_KSS          8 x words: vector j has the file's words 2j, 2j + 1 of a row   2048 = 16 * 128
// IQ4_KS and IQ4_KSS have f32[16] of row scales before a panel's first superblock.
#pragma once

#include "kernels.h"
#include "quants.h"

namespace deskside {
namespace {

template <Type T> struct Panel;

// Blocks: of 32 weights per superblock. B: the file's block. Header: bytes of a row's header.
template <class B, int Blocks, bool HasMin = false, int Header = 0, bool Halves = false>
struct PanelOf {
  using Block = B;
  static constexpr int blocks = Blocks;
  static constexpr int bytes = kPanelRows * int(sizeof(B));
  static constexpr int header = Header;    // bytes of a row's float scale before its blocks
  static constexpr bool has_min = HasMin;  // weight = scale * q - min
  static constexpr bool halves = Halves;   // a scale per 16 weights
};
template <> struct Panel<Type::Q4_0> : PanelOf<BlockQ4_0, 1> {};
template <> struct Panel<Type::Q4_1> : PanelOf<BlockQ4_1, 1, true> {};
template <> struct Panel<Type::Q5_0> : PanelOf<BlockQ5_0, 1> {};
template <> struct Panel<Type::Q5_1> : PanelOf<BlockQ5_1, 1, true> {};
template <> struct Panel<Type::Q8_0> : PanelOf<BlockQ8_0, 1> {};
template <> struct Panel<Type::Q4_K> : PanelOf<BlockQ4_K, 8, true> {};
template <> struct Panel<Type::Q5_K> : PanelOf<BlockQ5_K, 8, true> {};
template <> struct Panel<Type::Q6_K> : PanelOf<BlockQ6_K, 8, false, 0, true> {};
template <> struct Panel<Type::IQ4_NL> : PanelOf<BlockIQ4_NL, 1> {};
template <> struct Panel<Type::IQ4_XS> : PanelOf<BlockIQ4_XS, 8> {};
template <> struct Panel<Type::IQ4_KS> : PanelOf<BlockIQ4_KS, 8, false, 4> {};
template <> struct Panel<Type::IQ4_KSS> : PanelOf<BlockIQ4_KSS, 8, false, 4> {};

constexpr int kVector = 4 * kPanelRows;  // 64 bytes: four weights of each row

}  // namespace
}  // namespace deskside
