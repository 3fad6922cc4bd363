// A row of a file's blocks to floats, for embedding rows: the plain twin of unpack.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace deskside {

// y[i] = weight i of a row of n weights at `row`, laid out as in the file.
void dequantize_row(Type type, const uint8_t* row, int64_t n, float* y);

}  // namespace deskside
