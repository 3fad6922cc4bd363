// The kernels of delta.cpp and attention.cpp, for the table in sequence.cpp.
#pragma once

#include "kernels.h"

namespace deskside::DESKSIDE_ISA {

void gated_delta(const DeltaSlice& s);
void store_kv(const float* x, int n, Type type, uint8_t* dst);
void attention(const AttentionTile& t);

}  // namespace deskside::DESKSIDE_ISA
