// Rows of a KV cache: f32, f16 or q8_0. Everything here has internal linkage.
#pragma once

#include "kernels.h"
#include "quants.h"
#include "simd.h"

namespace deskside {
namespace {

// Stores d = max|x| / 127, and x / d in 8 bits. If x has a NaN or an infinity, d is NaN, so that
// the error is not hidden.
inline void store_q8_0(uint8_t* p, const float* x) {
  constexpr int parts = 32 / kLanes;
  vf v[parts], top = vf{}, poison = vf{};  // poison: NaN if any value is NaN or infinite
  for (int i = 0; i < parts; i++) {
    v[i] = load(x + i * kLanes);
    top = vmax(vmax(v[i], -v[i]), top);
    poison += v[i] * 0.0f;
  }
  const float nan = sum(poison), d = max(top) / 127.0f;
  const bool finite = nan == 0;
  const float inverse = d > 0 && finite ? 1.0f / d : 0.0f;
  BlockQ8_0 block;
  for (int i = 0; i < parts; i++) store_int8(block.qs + i * kLanes, finite ? v[i] * inverse : vf{});
  block.d = float_to_f16(d + nan);
  memcpy(p, &block, sizeof block);
}

// A row's values c .. c + 31 as floats; `c` is a multiple of 32.
template <Type T> inline void decode32(const uint8_t* row, int c, float* y) {
  if constexpr (T == Type::Q8_0) {
    const auto* block = reinterpret_cast<const BlockQ8_0*>(row) + c / 32;
    const float d = f16_to_float(block->d);
    for (int i = 0; i < 32; i += kLanes) store(y + i, load_int8(block->qs + i) * d);
  } else if constexpr (T == Type::F16) {
    for (int i = 0; i < 32; i += kLanes) store(y + i, load_f16(row + 2 * (c + i)));
  } else {
    const float* x = reinterpret_cast<const float*>(row) + c;
    for (int i = 0; i < 32; i += kLanes) store(y + i, load(x + i));
  }
}

// The same for the last n < 32 values of a row of floats. Values past the end are 0.
template <Type T> inline void decode_last(const uint8_t* row, int c, int n, float* y) {
  for (int i = 0; i < 32; i++) {
    float x = 0;
    if (i < n && T == Type::F32) memcpy(&x, row + 4 * (c + i), 4);
    if (i < n && T == Type::F16) {
      uint16_t h;
      memcpy(&h, row + 2 * (c + i), 2);
      x = f16_to_float(h);
    }
    y[i] = x;
  }
}

// Rows of the cache, one per position: `dim` values each, `row_bytes` apart.
struct Source {
  const uint8_t* rows;
  int64_t row_bytes;
  int dim;
};

// Decodes columns [c0, c0 + columns) of n rows, from row `first` on, to floats. The rows of `to`
// are `pitch` floats apart. c0 and columns are multiples of 32.
template <Type T>
inline void decode_rows(const Source& s, int64_t first, int n, int c0, int columns, float* to,
                        int64_t pitch) {
  for (int i = 0; i < n; i++) {
    const uint8_t* row = s.rows + (first + i) * s.row_bytes;
    for (int c = c0; c < c0 + columns; c += 32) {
      float* y = to + i * pitch + c - c0;
      if (c + 32 <= s.dim)
        decode32<T>(row, c, y);
      else
        decode_last<T>(row, c, s.dim - c, y);
    }
  }
}

inline void decode_rows(Type type, const Source& s, int64_t first, int n, int c0, int columns,
                        float* to, int64_t pitch) {
  if (type == Type::F32) return decode_rows<Type::F32>(s, first, n, c0, columns, to, pitch);
  if (type == Type::F16) return decode_rows<Type::F16>(s, first, n, c0, columns, to, pitch);
  decode_rows<Type::Q8_0>(s, first, n, c0, columns, to, pitch);
}

}  // namespace
}  // namespace deskside
