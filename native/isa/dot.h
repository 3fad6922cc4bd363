// Multiplies one panel, or panels in the tile, by a few rows of activations. Everything here has
// internal linkage.
//
// Small unsigned weights multiply x as they are. Their offset is subtracted once per block, as is
// the bias of 128 that the tile's weights have on AVX-512. SSE and AVX2 sum pairs of products in 16
// bits, there over as many groups as cannot overflow.
#pragma once

#include <bit>

#include "unpack.h"

namespace deskside {
namespace {

// How many bytes ahead of the current block are prefetched: kFar to L2, kNear to L1. The hardware's
// prefetcher stops at the end of a 4 KiB page. L1 from 3 KiB ahead costs a sixth of the speed
// (docs/LOG.md).
constexpr int64_t kFar = 3072, kNear = 1024;

template <int Locality> inline void fetch(const uint8_t* p, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + line, 0, Locality);
}

// The offsets of a record's parts (kernels.h). All rows of x share them, so a row needs one
// register.
struct Parts {
  int64_t d, s, c32, c16, s16;
  explicit Parts(int64_t cols)
      : d(cols),
        s(d + cols / 32 * 4),
        c32(s + cols / 32 * 4),
        c16(c32 + cols / 32 * 4),
        s16(c16 + cols / 16 * 4) {}
};

inline float float_at(const uint8_t* p, int64_t at) {
  float f;
  std::memcpy(&f, p + at, 4);
  return f;
}

// A block of 32 weights of a panel in registers, for dot_block. Of panel j, scale(j, h) and
// min(j, h) are those of half h, or of the block; group(j, k) has the weights of group k of the
// half that was unpacked last, by half<H>().
template <Type T> struct InRegisters {
  const uint8_t* s;
  int b, part;
  Scales u;
  Bytes w[4];

  DESKSIDE_INLINE InRegisters(const uint8_t* superblock, const uint8_t* rows, int block, int of)
      : s(superblock), b(block), part(of) {
    unpack_scales<T>(s, rows, b, part, u);
  }
  template <int H> DESKSIDE_INLINE void half() { unpack_half<T, H, 0>(s, b, part, u, w); }
  Bytes group(int, int k) const { return w[k]; }
  vf scale(int, int h) const { return u.scale[h]; }
  vf min(int, int h) const { return u.min[h]; }
};

// The same of block b of the tile's panels, registers of `part`, with `per` scales per block.
template <int per> struct InTile {
  const Tile& t;
  int64_t b;
  int part;
  int64_t first = 0;  // group

  template <int H> void half() { first = b * 8 + 4 * H; }
  Bytes group(int j, int k) const {
    const auto* from = reinterpret_cast<const uint8_t*>(t.panel[j].w);
    return vector_at(from + (first + k) * kVector, part);
  }
  vf scale(int j, int h) const { return load(at(t.panel[j].scale, h)); }
  vf min(int j, int h) const { return load(at(t.panel[j].min, h)); }

 private:
  const float* at(const float* p, int h) const {
    return p + (b * per + h) * kPanelRows + part * kLanes;
  }
};

// Where the sum starts, for weights that are too large by an offset or the bias: at -offset times
// the sum of x. c has -128 times that sum.
template <Numbers N> inline Bytes start(const uint8_t* c) {
  if constexpr (N.top == 0) return kBias == 0 ? Bytes{} : splat_lane(c);
  if constexpr (N.offset == 0) return Bytes{};
  return (Bytes)((vi)splat_lane(c) >> (7 - std::countr_zero(unsigned(N.offset))));
}

// Adds the products of a half, with M rows of x at byte `at`.
template <int Top, int R, int M, class Weights32>
DESKSIDE_INLINE void dot_half(const Weights32& w, const uint8_t* const* x, int64_t at,
                              Bytes (&sum)[R][M]) {
  if constexpr (in_pairs(Top) == 0) {
    // Unrolled for every M: otherwise the weights go through memory once more.
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      Bytes v[R], abs[R];
      for (int j = 0; j < R; j++) v[j] = w.group(j, k), abs[j] = magnitude(v[j]);
      for (int i = 0; i < M; i++) {
        const Bytes xi = splat_lane(x[i] + at + 4 * k);
        for (int j = 0; j < R; j++) sum[j][i] = dot4(sum[j][i], v[j], abs[j], xi);
      }
    }
  } else {
    constexpr int run = in_pairs(Top) < 4 ? in_pairs(Top) : 4;
    static_assert(4 % run == 0);
    Bytes two[R][M];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      for (int i = 0; i < M; i++) {
        const Bytes xi = splat_lane(x[i] + at + 4 * k);
        for (int j = 0; j < R; j++) {
          const Bytes p = pairs(w.group(j, k), xi);
          two[j][i] = k % run == 0 ? p : add_pairs(two[j][i], p);
          if (k % run == run - 1) sum[j][i] = add_sums(sum[j][i], two[j][i]);
        }
      }
    }
  }
}

// Multiplies a block of 32 weights, in kLanes rows of R panels, by M rows of x.
template <Numbers N, int R, int M, class Weights32>
DESKSIDE_INLINE void dot_block(Weights32&& w, const uint8_t* const* x, const Parts& parts,
                               int64_t b, vf (&acc)[R][M]) {
  constexpr int halves = N.halves ? 2 : 1;
  Bytes sum[halves][R][M];
  for (int h = 0; h < halves; h++) {
    const int64_t c = N.halves ? parts.c16 + 8 * b + 4 * h : parts.c32 + 4 * b;
    for (int i = 0; i < M; i++)
      for (int j = 0; j < R; j++) sum[h][j][i] = start<N>(x[i] + c);
  }
  w.template half<0>();
  dot_half<N.top>(w, x, 32 * b, sum[0]);
  w.template half<1>();
  dot_half<N.top>(w, x, 32 * b + 16, sum[halves - 1]);
  for (int j = 0; j < R; j++) {
    for (int i = 0; i < M; i++) {
      vf product = to_float(sum[0][j][i]) * w.scale(j, 0);
      if constexpr (N.halves) product += to_float(sum[1][j][i]) * w.scale(j, 1);
      acc[j][i] += product * float_at(x[i], parts.d + 4 * b);
      if constexpr (N.has_min && N.halves) {
        acc[j][i] -= w.min(j, 0) * float_at(x[i], parts.s16 + 8 * b);
        acc[j][i] -= w.min(j, 1) * float_at(x[i], parts.s16 + 8 * b + 4);
      } else if constexpr (N.has_min) {
        acc[j][i] -= w.min(j, 0) * float_at(x[i], parts.s + 4 * b);
      }
    }
  }
}

// Stores the valid rows of a panel: the last panel may have fewer than 16.
inline void store_rows(float* y, int part, int valid, vf v) {
  const int first = part * kLanes;
  if (first + kLanes <= valid) {
    store(y + first, v);
    return;
  }
  for (int i = 0; first + i < valid; i++) y[first + i] = v[i];
}

// A loop over parts would keep its sums, and what all parts share, in memory. SSE's four parts are
// too much code.
constexpr int kUnrolled = kParts <= 2 ? kParts : 1;

template <Type T, int M>
void dot_direct(const uint8_t* panel, int64_t cols, const uint8_t* const* x, float* y, int64_t ldy,
                int valid, const uint8_t* next) {
  using P = Panel<T>;
  const Parts parts(cols);
  vf acc[kParts][1][M];
  for (int part = 0; part < kParts; part++)
    for (int i = 0; i < M; i++) acc[part][0][i] = vf{};
  const uint8_t* s = panel + P::header * kPanelRows;
  constexpr int bytes = P::bytes / P::blocks;  // of a block
  const uint8_t* const end = s + cols / 32 * bytes;
  // After `end` the stream continues at `next`.
  const auto ahead = [&](const uint8_t* p) { return p >= end ? p + (next - end) : p; };
  for (int64_t b = 0; b < cols / 32; s += P::bytes) {
    for (int j = 0; j < P::blocks; j++, b++) {
      fetch<2>(ahead(s + j * bytes + kFar), bytes);
      fetch<3>(ahead(s + j * bytes + kNear), bytes);
#pragma GCC unroll kUnrolled
      for (int part = 0; part < kParts; part++) {
        dot_block<P::numbers>(InRegisters<T>(s, panel, j, part), x, parts, b, acc[part]);
      }
    }
  }
  for (int part = 0; part < kParts; part++)
    for (int i = 0; i < M; i++) store_rows(y + i * ldy, part, valid, acc[part][0][i]);
}

// noipa: gcc 12.2 clones this function for a constant argument and loses its body
// (tests/test_kernels.py would find it).
#if defined(__GNUC__) && !defined(__clang__)
#define DESKSIDE_NO_CLONE __attribute__((noipa))
#else
#define DESKSIDE_NO_CLONE
#endif
template <Type T> DESKSIDE_NO_CLONE void unpack_panel(const uint8_t* panel, int64_t cols,
                                                      Tile::Unpacked t) {
  using P = Panel<T>;
  constexpr int per = P::numbers.halves ? 2 : 1;
  const uint8_t* s = panel + P::header * kPanelRows;
  for (int64_t b = 0; b < cols / 32; s += P::bytes) {
    for (int j = 0; j < P::blocks; j++, b++) {
      for (int part = 0; part < kParts; part++) {
        Scales u;
        Bytes w[2][4];
        unpack_scales<T>(s, panel, j, part, u);
        unpack_half<T, 0, kPlus<T>>(s, j, part, u, w[0]);
        unpack_half<T, 1, kPlus<T>>(s, j, part, u, w[1]);
        for (int g = 0; g < 8; g++)
          store_bytes(t.w + (b * 8 + g) * kVector + part * 4 * kLanes, w[g / 4][g % 4]);
        for (int h = 0; h < per; h++) {
          const int64_t at = (b * per + h) * kPanelRows + part * kLanes;
          store(t.scale + at, u.scale[h]);
          if constexpr (P::numbers.has_min) store(t.min + at, u.min[h]);
        }
      }
    }
  }
}

// Multiplies R unpacked panels by M rows of x. y[j] is where panel j's results start. Meanwhile it
// prefetches the panels to be unpacked next, from `next` on, `ahead` bytes per block.
template <Numbers N, int R, int M>
void dot_tile(const Tile& t, int64_t cols, const uint8_t* const* x, float* const* y, int64_t ldy,
              const int* valid, const uint8_t* next, int ahead) {
  const Parts parts(cols);
  for (int part = 0; part < kParts; part++) {
    vf acc[R][M];
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) acc[j][i] = vf{};
    for (int64_t b = 0; b < cols / 32; b++, next += ahead) {
      fetch<2>(next, ahead);
      dot_block<N>(InTile<N.halves ? 2 : 1>{t, b, part}, x, parts, b, acc);
    }
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) store_rows(y[j] + i * ldy, part, valid[j], acc[j][i]);
  }
}

}  // namespace
}  // namespace deskside
