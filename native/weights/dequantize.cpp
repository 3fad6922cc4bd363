#include "dequantize.h"

#include <cmath>
#include <cstring>

#include "quants.h"
#include "simd.h"

namespace deskside {

namespace {

// Byte i has weight i in its low nibble and weight i + 16 in its high one. Bit i of `fifth` is the
// fifth bit of weight i.
template <class F> void nibbles(const uint8_t* x, uint32_t fifth, float* y, F&& value) {
  for (int i = 0; i < 16; i++) {
    y[i] = value((x[i] & 15) | (fifth >> i & 1) << 4);
    y[i + 16] = value((x[i] >> 4) | (fifth >> (i + 16) & 1) << 4);
  }
}

void row_of(const BlockQ4_0& b, float, float* y) {
  const float d = f16_to_float(b.d);
  nibbles(b.qs, 0, y, [&](int q) { return d * float(q - 8); });
}
void row_of(const BlockQ4_1& b, float, float* y) {
  const float d = f16_to_float(b.d), m = f16_to_float(b.m);
  nibbles(b.qs, 0, y, [&](int q) { return d * float(q) + m; });
}
void row_of(const BlockQ5_0& b, float, float* y) {
  const float d = f16_to_float(b.d);
  nibbles(b.qs, b.qh, y, [&](int q) { return d * float(q - 16); });
}
void row_of(const BlockQ5_1& b, float, float* y) {
  const float d = f16_to_float(b.d), m = f16_to_float(b.m);
  nibbles(b.qs, b.qh, y, [&](int q) { return d * float(q) + m; });
}
void row_of(const BlockQ6_0& b, float, float* y) {
  const float d = f16_to_float(b.d);
  for (int i = 0; i < 32; i++) {
    const int high = b.qh[i % 8] >> (i / 16 * 2 + i / 8 % 2 * 4) & 3;
    y[i] = d * float((b.qs[i % 16] >> (i / 16 * 4) & 15) + 16 * high - 32);
  }
}
void row_of(const BlockQ8_0& b, float, float* y) {
  const float d = f16_to_float(b.d);
  for (int i = 0; i < 32; i++) y[i] = d * float(b.qs[i]);
}
void row_of(const BlockIQ4_NL& b, float, float* y) {
  const float d = f16_to_float(b.d);
  nibbles(b.qs, 0, y, [&](int q) { return d * float(kCodebook4[q]); });
}

void row_of(const BlockMXFP4& b, float, float* y) {
  const float d = std::ldexp(1.0f, b.e - 128);
  nibbles(b.qs, 0, y, [&](int q) { return d * float(kE2M1[q]); });
}

// Weights of superblocks: i of 256 in two bits, one bit, or a nibble of pairs of 32.
int two_bits(const uint8_t* x, int i) {
  return x[32 * (i / 128) + i % 32] >> (i % 128 / 32 * 2) & 3;
}
int one_bit(const uint8_t* x, int i) { return x[i % 32] >> (i / 32) & 1; }
int nibble(const uint8_t* x, int i) { return x[32 * (i / 64) + i % 32] >> (i % 64 / 32 * 4) & 15; }

void row_of(const BlockQ2_K& b, float, float* y) {
  const float d = f16_to_float(b.d), dmin = f16_to_float(b.dmin);
  for (int i = 0; i < 256; i++) {
    const uint8_t s = b.scales[i / 16];
    y[i] = d * float(s & 15) * float(two_bits(b.qs, i)) - dmin * float(s >> 4);
  }
}
// 16 sub-blocks: y[i] = scale(i / 16) * value(i).
template <class Scale, class Value> void sixteens(float* y, Scale&& scale, Value&& value) {
  for (int j = 0; j < 16; j++) {
    const float d = scale(j);
    for (int i = 16 * j; i < 16 * (j + 1); i++) y[i] = d * float(value(i));
  }
}

void row_of(const BlockQ3_K& b, float, float* y) {
  const float d = f16_to_float(b.d);
  const auto scale = [&](int j) {
    const int low = b.scales[j % 8] >> (j / 8 * 4) & 15;
    return d * float((low | (b.scales[8 + j % 4] >> (j / 4 * 2) & 3) << 4) - 32);
  };
  sixteens(y, scale, [&](int i) { return two_bits(b.qs, i) + 4 * one_bit(b.hmask, i) - 4; });
}

// The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K.
void k_scale(const uint8_t* b, int j, int& scale, int& min) {
  if (j < 4) {
    scale = b[j] & 63, min = b[j + 4] & 63;
  } else {
    scale = (b[j + 4] & 15) | (b[j - 4] >> 6) << 4;
    min = b[j + 4] >> 4 | (b[j] >> 6) << 4;
  }
}
template <class Block> void k_row(const Block& b, const uint8_t* qh, float* y) {
  const float d = f16_to_float(b.d), dmin = f16_to_float(b.dmin);
  for (int j = 0; j < 8; j++) {
    int scale, min;
    k_scale(b.scales, j, scale, min);
    for (int i = 0; i < 32; i++) {
      int q = nibble(b.qs, 32 * j + i);
      if (qh) q |= one_bit(qh, 32 * j + i) << 4;
      y[32 * j + i] = d * float(scale) * float(q) - dmin * float(min);
    }
  }
}
void row_of(const BlockQ4_K& b, float, float* y) { k_row(b, nullptr, y); }
void row_of(const BlockQ5_K& b, float, float* y) { k_row(b, b.qh, y); }

void row_of(const BlockQ6_K& b, float, float* y) {
  const float d = f16_to_float(b.d);
  sixteens(
      y, [&](int j) { return d * float(b.scales[j]); },
      [&](int i) {
        const int half = i / 128, quarter = i % 128 / 32;
        const int low = b.ql[64 * half + i % 64] >> (quarter / 2 * 4) & 15;
        return (low | two_bits(b.qh, i) << 4) - 32;
      });
}
void row_of(const BlockIQ4_XS& b, float, float* y) {
  const float d = f16_to_float(b.d);
  for (int j = 0; j < 8; j++) {
    const int ls = (b.scales_l[j / 2] >> (4 * (j & 1)) & 15) | (b.scales_h >> (2 * j) & 3) << 4;
    const float scale = d * float(ls - 32);
    nibbles(b.qs + 16 * j, 0, y + 32 * j, [&](int q) { return scale * float(kCodebook4[q]); });
  }
}

// The scales of IQ4_K and IQ5_K, -32..31 times d.
template <class Block> auto ik_scales(const Block& b) {
  return [&b, d = f16_to_float(b.d)](int j) {
    const int low = b.scales_l[j / 2] >> (j % 2 * 4) & 15;
    return d * float((low | (b.scales_h[j / 4] >> (j % 4 * 2) & 3) << 4) - 32);
  };
}
void row_of(const BlockIQ4_K& b, float, float* y) {
  sixteens(y, ik_scales(b), [&](int i) {
    const int j = i / 16, q = b.qs[16 * (j / 2) + i % 16] >> (j % 2 * 4) & 15;
    return kCodebook4[q] + kShift4 * (b.extra >> j & 1);
  });
}
void row_of(const BlockIQ5_K& b, float, float* y) {
  sixteens(y, ik_scales(b), [&](int i) {
    return kCodebook5[nibble(b.qs, i) | one_bit(b.qh, i) << 4] + kShift5 * (b.extra >> i / 16 & 1);
  });
}
void row_of(const BlockIQ6_K& b, float, float* y) {
  const float d = f16_to_float(b.d);
  sixteens(
      y, [&](int j) { return d * float(b.scales[j]); },
      [&](int i) {
        const int q = nibble(b.qs, i) | two_bits(b.qh, i) << 4;
        return kCodebook6[q] + kShift6 * (b.extra >> i / 16 & 1);
      });
}

// The scales of IQ4_KS, IQ5_KS and IQ4_KSS; bit 0 shifts the codebook.
float ks_scale(float row, int s) { return row * float((s & 254) - 127); }
void row_of(const BlockIQ4_KS& b, float row, float* y) {
  for (int j = 0; j < 8; j++) {
    const int s = b.scales[j];
    nibbles(b.qs + 16 * j, 0, y + 32 * j,
            [&](int q) { return ks_scale(row, s) * float(kCodebook4[q] + kShift4 * (s & 1)); });
  }
}
void row_of(const BlockIQ5_KS& b, float row, float* y) {
  for (int i = 0; i < 256; i++) {
    const int s = b.scales[i / 32], q = nibble(b.qs, i) | one_bit(b.qh, i) << 4;
    y[i] = ks_scale(row, s) * float(kCodebook5[q] + kShift5 * (s & 1));
  }
}
void row_of(const BlockIQ4_KSS& b, float row, float* y) {
  for (int j = 0; j < 8; j++) {
    // Bit 0 of word k is bit k of the scale. The other bits, xored with themselves shifted right by
    // one, are four nibbles.
    uint8_t x[16];
    int s = 0;
    for (int k = 0; k < 8; k++) {
      const uint16_t word = b.qs[8 * j + k], v = word & 0xfffe, pair = v ^ (v >> 1);
      s |= (word & 1) << k;
      std::memcpy(x + 2 * k, &pair, 2);
    }
    nibbles(x, 0, y + 32 * j,
            [&](int q) { return ks_scale(row, s) * float(kCodebook4[q] + kShift4 * (s & 1)); });
  }
}

template <class Block, int Weights, int Header = 0>
void rows(const uint8_t* row, int64_t n, float* y) {
  float scale = 0;
  if constexpr (Header != 0) std::memcpy(&scale, row, Header);
  const auto* blocks = reinterpret_cast<const Block*>(row + Header);
  for (int64_t b = 0; b < n / Weights; b++) row_of(blocks[b], scale, y + b * Weights);
}

void rows_16(Type type, const uint8_t* row, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) {
    uint16_t h;
    std::memcpy(&h, row + 2 * i, 2);
    y[i] = type == Type::F16 ? f16_to_float(h) : bf16_to_float(h);
  }
}

}  // namespace

void dequantize_row(Type type, const uint8_t* row, int64_t n, float* y) {
  switch (type) {
    case Type::F32: std::memcpy(y, row, size_t(4 * n)); break;
    case Type::F16:
    case Type::BF16: rows_16(type, row, n, y); break;
    case Type::Q4_0: rows<BlockQ4_0, 32>(row, n, y); break;
    case Type::Q4_1: rows<BlockQ4_1, 32>(row, n, y); break;
    case Type::Q5_0: rows<BlockQ5_0, 32>(row, n, y); break;
    case Type::Q5_1: rows<BlockQ5_1, 32>(row, n, y); break;
    case Type::Q6_0: rows<BlockQ6_0, 32>(row, n, y); break;
    case Type::MXFP4: rows<BlockMXFP4, 32>(row, n, y); break;
    case Type::Q2_K: rows<BlockQ2_K, 256>(row, n, y); break;
    case Type::Q3_K: rows<BlockQ3_K, 256>(row, n, y); break;
    case Type::IQ4_K: rows<BlockIQ4_K, 256>(row, n, y); break;
    case Type::IQ5_K: rows<BlockIQ5_K, 256>(row, n, y); break;
    case Type::IQ6_K: rows<BlockIQ6_K, 256>(row, n, y); break;
    case Type::IQ5_KS: rows<BlockIQ5_KS, 256, 4>(row, n, y); break;
    case Type::Q8_0: rows<BlockQ8_0, 32>(row, n, y); break;
    case Type::Q4_K: rows<BlockQ4_K, 256>(row, n, y); break;
    case Type::Q5_K: rows<BlockQ5_K, 256>(row, n, y); break;
    case Type::Q6_K: rows<BlockQ6_K, 256>(row, n, y); break;
    case Type::IQ4_NL: rows<BlockIQ4_NL, 32>(row, n, y); break;
    case Type::IQ4_XS: rows<BlockIQ4_XS, 256>(row, n, y); break;
    case Type::IQ4_KS: rows<BlockIQ4_KS, 256, 4>(row, n, y); break;
    case Type::IQ4_KSS: rows<BlockIQ4_KSS, 256, 4>(row, n, y); break;
  }
}

}  // namespace deskside
