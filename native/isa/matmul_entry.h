// The kernels of matmul.cpp, for the table in sequence.cpp.
#pragma once

#include "kernels.h"

namespace deskside::DESKSIDE_ISA {

void quantize(const float* x, int64_t first, int64_t n, uint8_t* record, int64_t cols);
void matmul(const Weights& w, const PanelRange& panels, const Rows& x, const Results& y,
            const Tile& tile);
void matmul_pair(const Weights& w, const Weights& v, const PanelRange& panels, const Rows& x,
                 const Results& y, const Results& z, const Tile& tile);
int64_t dot_peak(int64_t rounds, int32_t* result);

}  // namespace deskside::DESKSIDE_ISA
