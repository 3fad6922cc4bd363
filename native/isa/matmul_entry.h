// What matmul.cpp gives to the kernel table of its instruction set (assembled in sequence.cpp).
#pragma once

#include "kernels.h"

namespace deskside::DESKSIDE_ISA {

void quantize(const float* x, int64_t first, int64_t n, uint8_t* record, int64_t cols);
void matmul(const Weights& w, int64_t p0, int64_t p1, const Rows& x, const int32_t* index, int m,
            float* y, int64_t ldy, const Tile& tile, const uint8_t* then);

void matmul_pair(const Weights& w, const Weights& v, int64_t p0, int64_t p1, const Rows& x,
                 const int32_t* index, int m, float* y, float* z, int64_t ldy, const Tile& tile);
int64_t dot_peak(int64_t rounds, int32_t* result);

}  // namespace deskside::DESKSIDE_ISA
