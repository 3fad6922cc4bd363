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
struct BlockQ8_0 { uint16_t d; int8_t qs[32]; };                     // y = d q
struct BlockQ4_K { uint16_t d, dmin; uint8_t scales[12], qs[128]; };
struct BlockQ5_K { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; };
struct BlockQ6_K { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; };
struct BlockIQ4_NL { uint16_t d; uint8_t qs[16]; };                  // y = d K0[q]
struct BlockIQ4_XS { uint16_t d, scales_h; uint8_t scales_l[4], qs[128]; };
struct BlockIQ4_KS { uint8_t scales[8], qs[128]; };                  // after the row's float d
struct BlockIQ4_KSS { uint16_t qs[64]; };                            // after the row's float d
// clang-format on
#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18);
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ4_XS) == 136 && sizeof(BlockIQ4_KS) == 136);
static_assert(sizeof(BlockIQ4_KSS) == 128);

// Codebooks: IQ4_NL and IQ4_XS use the first; IQ4_KS and IQ4_KSS choose by the scale's low bit.
alignas(16) constexpr int8_t kCodebook[2][16] = {
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117},
};

}  // namespace deskside
