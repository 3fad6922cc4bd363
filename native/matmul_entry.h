// What matmul.cpp gives to the kernel table of its instruction set (assembled in sequence.cpp).
#pragma once

#include "kernels.h"

namespace deskside::DESKSIDE_ISA {

void quantize_row(const float* x, int64_t n, int8_t* q, float* d, float* s);
void matmul(const Matrix& w, int64_t r0, int64_t r1, const Rows& x, const int32_t* index, int m,
            float* y, int64_t ldy, const Tile& tile);
void dequantize_row(const Matrix& w, int64_t row, float* y, const Tile& tile);

}  // namespace deskside::DESKSIDE_ISA
