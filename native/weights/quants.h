// The block layouts of the quantised types in a file. gguf/quants.py specifies them.
#pragma once

#include <cstdint>

namespace deskside {

#pragma pack(push, 1)
// clang-format off
struct BlockQ4_0 { uint16_t d; uint8_t qs[16]; };                    // y = d (q - 8)
struct BlockQ4_1 { uint16_t d, m; uint8_t qs[16]; };                 // y = d q + m
struct BlockQ5_0 { uint16_t d; uint32_t qh; uint8_t qs[16]; };       // y = d (q - 16)
struct BlockQ5_1 { uint16_t d, m; uint32_t qh; uint8_t qs[16]; };    // y = d q + m
struct BlockQ6_0 { uint16_t d; uint8_t qh[8], qs[16]; };             // y = d (q - 32)
struct BlockQ8_0 { uint16_t d; int8_t qs[32]; };                     // y = d q
struct BlockMXFP4 { uint8_t e, qs[16]; };                            // y = 2^(e - 128) kE2M1[q]
struct BlockQ2_K { uint8_t scales[16], qs[64]; uint16_t d, dmin; };
struct BlockQ3_K { uint8_t hmask[32], qs[64], scales[12]; uint16_t d; };
struct BlockQ4_K { uint16_t d, dmin; uint8_t scales[12], qs[128]; };
struct BlockQ5_K { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; };
struct BlockQ6_K { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; };
struct BlockIQ4_NL { uint16_t d; uint8_t qs[16]; };                  // y = d K0[q]
struct BlockIQ4_XS { uint16_t d, scales_h; uint8_t scales_l[4], qs[128]; };
struct BlockIQ4_K { uint16_t d, extra; uint8_t scales_h[4], scales_l[8], qs[128]; };
struct BlockIQ5_K { uint16_t d, extra; uint8_t scales_h[4], scales_l[8], qs[128], qh[32]; };
struct BlockIQ6_K { uint16_t d, extra; int8_t scales[16]; uint8_t qs[128], qh[64]; };
struct BlockIQ4_KS { uint8_t scales[8], qs[128]; };                  // behind the row's float d
struct BlockIQ4_KSS { uint16_t qs[64]; };                            // behind the row's float d
struct BlockIQ5_KS { uint8_t scales[8], qs[128], qh[32]; };          // behind the row's float d
// clang-format on
#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ6_0) == 26 && sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18);
static_assert(sizeof(BlockMXFP4) == 17 && sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110);
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ4_XS) == 136 && sizeof(BlockIQ4_KS) == 136);
static_assert(sizeof(BlockIQ4_K) == 144 && sizeof(BlockIQ5_K) == 176 && sizeof(BlockIQ6_K) == 212);
static_assert(sizeof(BlockIQ4_KSS) == 128 && sizeof(BlockIQ5_KS) == 168);

// Codebooks of 4, 5 and 6 bits. Where a bit of a scale says so, all values are larger by kShift4,
// kShift5 or kShift6 (IQ4_NL and IQ4_XS have no such bit).
alignas(16) constexpr int8_t kCodebook4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};
alignas(16) constexpr int8_t kCodebook5[32] = {
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1,   5,    11,   17,  23,  29,  36,  43,  51,  59,  68,  77,  87,  97,  109, 121};
alignas(16) constexpr int8_t kCodebook6[64] = {
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51,  -47,  -44,  -40,  -37,  -34, -31, -28, -25, -22, -19, -16, -13, -11, -8,  -5,
    -2,   0,    3,    6,    9,    12,  14,  17,  20,  23,  27,  30,  33,  36,  40,  44,
    47,   51,   55,   59,   63,   68,  72,  77,  82,  87,  92,  98,  103, 109, 115, 121};
constexpr int kShift4 = 4, kShift5 = 2, kShift6 = 1;
// The values of MXFP4's 4-bit floats, doubled.
alignas(16) constexpr int8_t kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

}  // namespace deskside
