// The layout of packed weights in memory: panels of 16 rows, the same for all instruction sets.
//
// A panel has 16 rows of a matrix, block after block along the row, in as many bytes as in the
// file. Within a block of 32 weights, the rows are interleaved, four weights at a time. Group g is
// the weights 4g..4g+3. So one register of activations multiplies 16 rows, and no sum runs across
// lanes. Bytes 4r to 4r + 3 of a vector belong to row r:
//
//   nibbles   4 x 64 bytes; vector j: byte 4r + i has weights 4j + i (low), 16 + 4j + i (high)
//   bytes     8 x 64 bytes; vector g: byte 4r + i has weight 4g + i
//   ones      64 bytes;     byte 4r + i, bit g: one bit of weight 4g + i
//   twos      2 x 64 bytes; vector g / 4, bits 2 (g % 4): two bits of weight 4g + i
//
// Superblocks of 16 rows, field by field (sizes in bytes, all arrays over the 16 rows):
//   Q4_0 IQ4_NL      d f16[16], nibbles                                              288 = 16 * 18
//   MXFP4            e u8[16], nibbles                                               272 = 16 * 17
//   Q4_1             d, m f16[16], nibbles                                           320 = 16 * 20
//   Q5_0             d f16[16], ones, nibbles                                        352 = 16 * 22
//   Q5_1             d, m f16[16], ones, nibbles                                     384 = 16 * 24
//   Q6_0             d f16[16], nibbles, twos                                        416 = 16 * 26
//   Q8_0             d f16[16], bytes                                                544 = 16 * 34
//   Q2_K             d, dmin f16[16], 16 x u8[16] scales and minima, 8 x twos       1344 = 16 * 84
//   Q3_K             d f16[16], 4 x u8[16] scales_h, 8 x u8[16] scales_l as IQ4_K has
//                    them, 8 x (ones, twos)                                         1760 = 16 * 110
//   Q4_K             d, dmin f16[16], 3 x u32[16] of 6-bit scales, 8 x nibbles      2304 = 16 * 144
//   Q5_K             the same, 8 x (ones, nibbles)                                  2816 = 16 * 176
//   Q6_K             d f16[16], 16 x i8[16] scales, 8 x (nibbles, twos)             3360 = 16 * 210
//   IQ4_XS           d, scales_h u16[16], scales_l u32[16], 8 x nibbles             2176 = 16 * 136
//   IQ4_K            d, extra u16[16], 4 x u8[16] scales_h, 8 x u8[16] scales_l,
//                    8 x nibbles                                                    2304 = 16 * 144
//   IQ5_K            the same, 8 x (ones, nibbles)                                  2816 = 16 * 176
//   IQ6_K            d, extra u16[16], 16 x i8[16] scales, 8 x (nibbles, twos)      3392 = 16 * 212
//   IQ4_KS           8 x u8[16] scales, 8 x nibbles                                 2176 = 16 * 136
//   IQ5_KS           8 x u8[16] scales, 8 x (ones, nibbles)                         2688 = 16 * 168
//   IQ4_KSS          8 x words: vector j has the file's words 2j, 2j + 1 of a row   2048 = 16 * 128
// IQ4_KS, IQ5_KS and IQ4_KSS have f32[16] of row scales before a panel's first superblock.
#pragma once

#include "kernels.h"
#include "quants.h"

namespace deskside {
namespace {

template <Type T> struct Panel;

// How the weights of a block become numbers: scale * (q - offset) - min.
struct Numbers {
  bool has_min = false;
  bool halves = false;  // a scale, and a minimum, per 16 weights
  int top = 0;          // q is 0..top; 0: any signed byte, with offset 0
  int offset = 0;       // 0 or a power of 2
};

// Blocks of 32 weights a superblock; bits of a weight's code, whose planes are a superblock's last
// fields; bytes of a row's float scale before its blocks.
template <class B, int Blocks, int Bits, Numbers N = {}, int Header = 0> struct PanelOf {
  using Block = B;
  static constexpr int blocks = Blocks;
  static constexpr int bits = Bits;
  static constexpr int bytes = kPanelRows * int(sizeof(B));  // of a superblock
  static constexpr Numbers numbers = N;
  static constexpr int header = Header;
};
constexpr Numbers kHalves{.halves = true};
template <> struct Panel<Type::Q4_0> : PanelOf<BlockQ4_0, 1, 4, {.top = 15, .offset = 8}> {};
template <> struct Panel<Type::Q4_1> : PanelOf<BlockQ4_1, 1, 4, {.has_min = true, .top = 15}> {};
template <> struct Panel<Type::Q5_0> : PanelOf<BlockQ5_0, 1, 5, {.top = 31, .offset = 16}> {};
template <> struct Panel<Type::Q5_1> : PanelOf<BlockQ5_1, 1, 5, {.has_min = true, .top = 31}> {};
template <> struct Panel<Type::Q6_0> : PanelOf<BlockQ6_0, 1, 6, {.top = 63, .offset = 32}> {};
template <> struct Panel<Type::Q8_0> : PanelOf<BlockQ8_0, 1, 8> {};
template <> struct Panel<Type::Q2_K>
    : PanelOf<BlockQ2_K, 8, 2, {.has_min = true, .halves = true, .top = 3}> {};
template <> struct Panel<Type::Q3_K>
    : PanelOf<BlockQ3_K, 8, 3, {.halves = true, .top = 7, .offset = 4}> {};
template <> struct Panel<Type::Q4_K> : PanelOf<BlockQ4_K, 8, 4, {.has_min = true, .top = 15}> {};
template <> struct Panel<Type::Q5_K> : PanelOf<BlockQ5_K, 8, 5, {.has_min = true, .top = 31}> {};
template <> struct Panel<Type::Q6_K>
    : PanelOf<BlockQ6_K, 8, 6, {.halves = true, .top = 63, .offset = 32}> {};
// Of MXFP4 q is the value plus 16.
template <> struct Panel<Type::MXFP4> : PanelOf<BlockMXFP4, 1, 4, {.top = 28, .offset = 16}> {};
template <> struct Panel<Type::IQ4_NL> : PanelOf<BlockIQ4_NL, 1, 4> {};
template <> struct Panel<Type::IQ4_XS> : PanelOf<BlockIQ4_XS, 8, 4> {};
template <> struct Panel<Type::IQ4_K> : PanelOf<BlockIQ4_K, 8, 4, kHalves> {};
template <> struct Panel<Type::IQ5_K> : PanelOf<BlockIQ5_K, 8, 5, kHalves> {};
template <> struct Panel<Type::IQ6_K> : PanelOf<BlockIQ6_K, 8, 6, kHalves> {};
template <> struct Panel<Type::IQ4_KS> : PanelOf<BlockIQ4_KS, 8, 4, {}, 4> {};
template <> struct Panel<Type::IQ5_KS> : PanelOf<BlockIQ5_KS, 8, 5, {}, 4> {};
template <> struct Panel<Type::IQ4_KSS> : PanelOf<BlockIQ4_KSS, 8, 4, {}, 4> {};

constexpr int kVector = 4 * kPanelRows;  // 64 bytes: four weights of each row

}  // namespace
}  // namespace deskside
