// Dequantises a row of a file's blocks, for embedding rows. isa/unpack.h does the same for panels.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace deskside {

// y[i] = weight i of the n weights of `row`, in the file's layout.
void dequantize_row(Type type, const uint8_t* row, int64_t n, float* y);

}  // namespace deskside
