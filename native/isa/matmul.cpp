// Matrix products on packed weights. Compiled once per instruction set (DESKSIDE_ISA).
//
// Quantised weights multiply activations rounded to 8 bits per block of 32. Products are summed
// exactly, in integers, within a block; blocks are summed in float32, in the order of the row.
// Float weights multiply float activations.
//
// For few rows of x (n <= kMaxDirect), blocks are unpacked in registers, so the weights stream. For
// more, a panel is unpacked once to the tile and used by all rows of x.
#include "matmul_entry.h"
#include "dot.h"

namespace deskside {
namespace {

// How many panels (kTogether) and rows of x (kRowsOfX) are multiplied together from the tile. Each
// pair has an integer sum and a float sum, which must stay in registers. More panels mean fewer
// loads of x.
#if defined(DESKSIDE_AVX512)
constexpr int kTogether = 2, kRowsOfX = 6, kMaxDirect = 8;
#else
constexpr int kTogether = 1, kRowsOfX = 4, kMaxDirect = 4;
#endif
inline int64_t place(const Rows& x, int i) { return x.index ? x.index[i] : i; }

inline const uint8_t* record(const Rows& x, int i) {
  return x.q + place(x, i) * record_bytes(x.cols);
}

// Calls f<M>() for a run-time m in 1..Max.
template <int Max, class F> inline void with_rows(int m, F&& f) {
  if constexpr (Max > 1) {
    if (m < Max) return with_rows<Max - 1>(m, f);
  }
  f.template operator()<Max>();
}

// Panels of one type that are multiplied together, and where the results of their rows start.
struct Panels {
  int n;
  const uint8_t* data[2];
  float* y[2];
  int valid[2];
};

// y: where the panel's results start.
inline void add_panel(Panels& p, const Weights& w, int64_t panel, float* y) {
  const int64_t left = w.rows - panel * kPanelRows;
  p.data[p.n] = w.data + panel * w.stride;
  p.y[p.n] = y;
  p.valid[p.n++] = int(left < kPanelRows ? left : kPanelRows);
}

// With a bias, the tile's weights of all types start at it: fewer kernels.
template <Type T> constexpr Numbers kInTile =
    kBias == 0 ? Panel<T>::numbers
               : Numbers{.has_min = Panel<T>::numbers.has_min, .halves = Panel<T>::numbers.halves};

// then: as in PanelRange.
template <Type T>
void multiply(const Panels& p, const Rows& x, int64_t ldy, const Tile& tile, const uint8_t* then) {
  using P = Panel<T>;
  constexpr int per_block = P::bytes / P::blocks;
  const int64_t cols = x.cols, bytes = P::header * kPanelRows + cols / 32 * per_block;
  const int m = x.n;
  if (m <= kMaxDirect) {
    const uint8_t* a[kMaxDirect];
    for (int i = 0; i < m; i++) a[i] = record(x, i);
    for (int j = 0; j < p.n; j++) {
      const uint8_t* end = p.data[j] + bytes;
      const uint8_t* next = j + 1 < p.n ? p.data[j + 1] : then ? then : end;
      with_rows<kMaxDirect>(
          m, [&]<int M>() { dot_direct<T, M>(p.data[j], cols, a, p.y[j], ldy, p.valid[j], next); });
    }
    return;
  }
  for (int j = 0; j < p.n; j++) unpack_panel<T>(p.data[j], cols, tile.panel[j]);
  // The next panels are prefetched evenly over all passes. If the first pass did it all, it would
  // wait for memory, and the others would leave the memory idle.
  const uint8_t* next = then ? then : p.data[p.n - 1] + bytes;
  const uint8_t* const next_end = next + p.n * bytes;
  const int passes = (m + kRowsOfX - 1) / kRowsOfX;
  const int ahead = (p.n * per_block / kParts / passes + 63) / 64 * 64;
  for (int i = 0; i < m; i += kRowsOfX) {
    const uint8_t* a[kRowsOfX];
    const int n = m - i < kRowsOfX ? m - i : kRowsOfX;
    for (int k = 0; k < n; k++) a[k] = record(x, i + k);
    float* const y[2] = {p.y[0] + i * ldy, p.n > 1 ? p.y[1] + i * ldy : nullptr};
    const int now = next < next_end ? ahead : 0;
    with_rows<kRowsOfX>(n, [&]<int M>() {
      if constexpr (kTogether == 2) {
        if (p.n == 2) return dot_tile<kInTile<T>, 2, M>(tile, cols, a, y, ldy, p.valid, next, now);
      }
      dot_tile<kInTile<T>, 1, M>(tile, cols, a, y, ldy, p.valid, next, now);
    });
    if (now) next += cols / 32 * kParts * now;
  }
}

template <Type T>
void matmul_quantised(const Weights& w, const PanelRange& range, const Rows& x, const Results& y,
                      const Tile& tile) {
  for (int64_t p = range.begin; p < range.end; p += kTogether) {
    Panels panels{};
    for (int64_t q = p; q < range.end && q < p + kTogether; q++)
      add_panel(panels, w, q, y.at + (q - range.begin) * kPanelRows);
    multiply<T>(panels, x, y.stride, tile, p + kTogether < range.end ? nullptr : range.then);
  }
}

template <Type T>
void pair_quantised(const Weights& w, const Weights& v, const PanelRange& range, const Rows& x,
                    const Results& y, const Results& z, const Tile& tile) {
  for (int64_t p = range.begin; p < range.end; p++) {
    const int64_t first = (p - range.begin) * kPanelRows;
    Panels panels{};
    add_panel(panels, w, p, y.at + first);
    if constexpr (kTogether == 1) {
      multiply<T>(panels, x, y.stride, tile, nullptr);
      panels.n = 0;
    }
    add_panel(panels, v, p, z.at + first);
    multiply<T>(panels, x, z.stride, tile, nullptr);
  }
}

// ---- float weights ------------------------------------------------------------------------------

void to_floats(const uint8_t* row, Type type, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, type == Type::F16 ? load_f16(row + 2 * i) : load_bf16(row + 2 * i));
  for (; i < n; i++) {
    uint16_t h;
    std::memcpy(&h, row + 2 * i, 2);
    y[i] = type == Type::F16 ? f16_to_float(h) : bf16_to_float(h);
  }
}

// Multiplies R rows of w by M rows of x.
template <int R, int M>
void dot_float(const float* const* w, int64_t cols, const float* const* x, float* y, int64_t ldy) {
  vf acc[R][M];
  float tail[R][M];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) acc[j][i] = vf{}, tail[j][i] = 0;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    for (int j = 0; j < R && M == 1; j++) __builtin_prefetch(w[j] + c + kNear / 4);
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) acc[j][i] += load(w[j] + c) * load(x[i] + c);
  }
  for (; c < cols; c++)
    for (int j = 0; j < R; j++)
      for (int i = 0; i < M; i++) tail[j][i] += w[j][c] * x[i][c];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < M; i++) y[i * ldy + j] = sum(acc[j][i]) + tail[j][i];
}

void matmul_float(const Weights& w, const PanelRange& range, const Rows& x, const Results& y,
                  const Tile& tile) {
  constexpr int kFloatX = kLanes == 16 ? 4 : 2;  // R * M sums and R or M operands fit in registers
  const int64_t row_bytes = w.cols * (w.type == Type::F32 ? 4 : 2);
  const int64_t begin = range.begin * kPanelRows;
  const int64_t end = range.end * kPanelRows < w.rows ? range.end * kPanelRows : w.rows;
  static_assert(kPanelRows % kFloatRows == 0);
  for (int64_t r = begin; r < end; r += kFloatRows) {
    const int rows = int(end - r < kFloatRows ? end - r : kFloatRows);
    const uint8_t* first = w.data + r / kPanelRows * w.stride + r % kPanelRows * row_bytes;
    const float* row[kFloatRows];
    for (int j = 0; j < rows; j++) {
      const uint8_t* raw = first + j * row_bytes;
      row[j] = w.type == Type::F32 ? reinterpret_cast<const float*>(raw) : tile.f + j * w.cols;
      if (w.type != Type::F32) to_floats(raw, w.type, w.cols, tile.f + j * w.cols);
    }
    for (int i = 0; i < x.n; i += kFloatX) {
      const int n = x.n - i < kFloatX ? x.n - i : kFloatX;
      const float* a[kFloatX];
      for (int k = 0; k < n; k++) a[k] = x.f + place(x, i + k) * x.stride;
      float* out = y.at + i * y.stride + (r - begin);
      with_rows<kFloatX>(n, [&]<int M>() {
        if (rows == kFloatRows) return dot_float<kFloatRows, M>(row, w.cols, a, out, y.stride);
        for (int j = 0; j < rows; j++) dot_float<1, M>(row + j, w.cols, a, out + j, y.stride);
      });
    }
  }
}

// ---- entries ------------------------------------------------------------------------------------

struct TypeEntry {
  Type type;
  decltype(Kernels::matmul) matmul;
  decltype(Kernels::matmul_pair) pair;  // null: one matrix after the other
};

template <Type T> constexpr TypeEntry quantised() {
  return {T, matmul_quantised<T>, pair_quantised<T>};
}

// clang-format off
constexpr TypeEntry kTypes[] = {
    {Type::F32, matmul_float, nullptr}, {Type::F16, matmul_float, nullptr},
    {Type::BF16, matmul_float, nullptr},
    quantised<Type::Q4_0>(), quantised<Type::Q4_1>(), quantised<Type::Q5_0>(),
    quantised<Type::Q5_1>(), quantised<Type::Q6_0>(), quantised<Type::Q8_0>(),
    quantised<Type::Q2_K>(), quantised<Type::Q3_K>(), quantised<Type::Q4_K>(),
    quantised<Type::Q5_K>(), quantised<Type::Q6_K>(), quantised<Type::IQ4_NL>(),
    quantised<Type::IQ4_XS>(), quantised<Type::IQ4_K>(), quantised<Type::IQ5_K>(),
    quantised<Type::IQ6_K>(), quantised<Type::IQ4_KS>(), quantised<Type::IQ4_KSS>(),
    quantised<Type::IQ5_KS>(), quantised<Type::MXFP4>(),
};
// clang-format on

const TypeEntry& entry(Type type) {
  for (const TypeEntry& e : kTypes)
    if (e.type == type) return e;
  __builtin_trap();  // module.cpp has checked the type
}

}  // namespace

namespace DESKSIDE_ISA {

void quantize(const float* x, int64_t first, int64_t n, uint8_t* record, int64_t cols) {
  constexpr int vectors = 32 / kLanes;
  const Parts parts(cols);
  auto* q = reinterpret_cast<int8_t*>(record);
  auto *d = reinterpret_cast<float*>(record + parts.d),
       *s = reinterpret_cast<float*>(record + parts.s);
  auto* c32 = reinterpret_cast<int32_t*>(record + parts.c32);
  auto* c16 = reinterpret_cast<int32_t*>(record + parts.c16);
  auto* s16 = reinterpret_cast<float*>(record + parts.s16);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integer, ties to even
  for (int64_t b = first / 32; b < (first + n) / 32; b++, x += 32) {
    vf v[vectors], top = vf{}, poison = vf{};  // poison: NaN if any value is NaN or infinite
    for (int i = 0; i < vectors; i++) {
      v[i] = load(x + kLanes * i);
      top = vmax(top, vmax(v[i], -v[i]));
      poison += v[i] * 0.0f;
    }
    const float amax = max(top), bad = sum(poison);
    // Below 1e-30 the inverse would overflow; such a block counts as zero.
    const vf inverse = splat(amax > 1e-30f && bad == 0 ? 127.0f / amax : 0.0f);
    vf total[2] = {vf{}, vf{}};  // of at most 16 values: exact
    for (int i = 0; i < vectors; i++) {
      const vf scaled = v[i] * inverse;
      const vf finite = scaled == scaled ? scaled : vf{};
      const vf whole = (finite + magic) - magic;
      store_int8(q + 32 * b + kLanes * i, whole);
      total[i * kLanes / 16] += whole;
    }
    d[b] = (amax > 1e-30f ? amax / 127.0f : 0.0f) + bad;
    const int32_t low = int32_t(sum(total[0]));
    const int32_t high = int32_t(sum(total[1]));
    s[b] = d[b] * float(low + high);
    c32[b] = -128 * (low + high);
    c16[2 * b] = -128 * low;
    c16[2 * b + 1] = -128 * high;
    s16[2 * b] = d[b] * float(low);
    s16[2 * b + 1] = d[b] * float(high);
  }
}

int64_t dot_peak(int64_t rounds, int32_t* result) {
  constexpr int kSums = kBias != 0 ? 12 : 4;  // enough to hide the latency of a dot product
  Bytes sum[kSums], w = splat_byte(3), x = splat_byte(1);
  const Bytes abs = magnitude(w);
  for (int i = 0; i < kSums; i++) sum[i] = splat_lane(0);
  for (int64_t r = 0; r < rounds; r++) {
    // To the compiler the operands change each time, so it cannot move work out of the loop. No
    // register holds an emulated vector, and its speed does not matter.
#if defined(__x86_64__) && !defined(DESKSIDE_EMULATED)
    asm volatile("" : "+v"(x));
#endif
    for (int i = 0; i < kSums; i++) {
#if defined(__x86_64__) && !defined(DESKSIDE_EMULATED)
      asm volatile("" : "+v"(w));
#endif
      sum[i] = dot4(sum[i], w, abs, x);
    }
  }
  for (int i = 1; i < kSums; i++) sum[0] = (Bytes)((vi)sum[0] + (vi)sum[i]);
  *result = ((vi)sum[0])[0];
  return rounds * kSums * kLanes * 4;
}

void matmul(const Weights& w, const PanelRange& panels, const Rows& x, const Results& y,
            const Tile& tile) {
  entry(w.type).matmul(w, panels, x, y, tile);
}

void matmul_pair(const Weights& w, const Weights& v, const PanelRange& panels, const Rows& x,
                 const Results& y, const Results& z, const Tile& tile) {
  const TypeEntry &a = entry(w.type), &b = entry(v.type);
  if (w.type == v.type && a.pair) return a.pair(w, v, panels, x, y, z, tile);
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const int64_t first = (p - panels.begin) * kPanelRows;
    a.matmul(w, {p, p + 1}, x, {y.at + first, y.stride}, tile);
    b.matmul(v, {p, p + 1}, x, {z.at + first, z.stride}, tile);
  }
}

}  // namespace DESKSIDE_ISA
}  // namespace deskside
