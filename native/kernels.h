// The only interface across instruction sets: a table of kernels, one instance per compiled set.
//
// Some files are compiled once per instruction set. They see only this header, quants.h, simd.h and
// what they include by name. Everything in them but the table entry has internal linkage. Otherwise
// the linker could select a weak symbol from an AVX-512 file for the baseline path.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deskside {

// ggml type ids, as stored in GGUF.
// clang-format off
enum class Type : int32_t {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
  Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30,
  MXFP4 = 39, Q6_0 = 133, IQ4_K = 139, IQ5_K = 140, IQ6_K = 141, IQ4_KS = 144, IQ4_KSS = 146,
  IQ5_KS = 152,
};
// clang-format on

static inline bool is_float(Type t) { return t == Type::F32 || t == Type::F16 || t == Type::BF16; }

constexpr int kPanelRows = 16;
static inline int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// A weight matrix packed in panels of 16 rows (panel.h), `stride` bytes apart. In a panel of a
// float type, the rows follow each other.
struct Weights {
  const uint8_t* data;
  Type type;
  int64_t rows, cols, stride;

  int64_t panels() const { return panels_of(rows); }
};

// Bytes of a record: one row of activations in 8 bits, for quantised weights. Its fields:
//   q    int8[cols]        x[i] ~ q[i] * d[i / 32]
//   d    float[cols / 32]
//   s    float[cols / 32]  d * sum of the block's q (for weights with a minimum)
//   c32  int32[cols / 32]  -128 * sum of the block's q (for weights biased by 128)
//   c16  int32[cols / 16]  the same per 16
//   s16  float[cols / 16]  as s, per 16
static inline int64_t record_bytes(int64_t cols) { return (cols + cols / 32 * 28 + 63) / 64 * 64; }

// The n rows of activations that a matrix is multiplied with. Row i is row index[i] in memory, or
// row i without an index.
struct Rows {
  const float* f;    // for float weights: rows of `cols` values, `stride` floats apart
  const uint8_t* q;  // for quantised weights: records, one after another
  int64_t cols, stride;
  int n;
  const int32_t* index = nullptr;
};

// The panels [begin, end) of a matrix.
struct PanelRange {
  int64_t begin, end;
  // What the thread reads next, to prefetch it. Null: the bytes after the last panel.
  const uint8_t* then = nullptr;
};

// Where a product is written: value (i, r) at at[i * stride + r]. i counts the rows of activations,
// r the rows of the matrix from the first panel of the range on.
struct Results {
  float* at;
  int64_t stride;  // in floats
};

// One thread's work memory for matmul: two unpacked panels, and four rows of floats for F16 and
// BF16.
struct Tile {
  struct Unpacked {
    int8_t* w;     // (cols / 32, 8, 64)
    float* scale;  // (cols / 32, 1 or 2, 16)
    float* min;    // (cols / 32, 1 or 2, 16)
  } panel[2];
  float* f;
};
constexpr int kFloatRows = 4;

struct DeltaSlice {
  float* state;               // (dim, dim): key x value, this head's
  int dim, c0, c1;            // value columns [c0, c1)
  int n;                      // tokens
  const float *q, *k, *v;     // normalised heads of the first token
  int64_t stride;             // floats from a token's row to the next
  const float *decay, *beta;  // per token, `gate_stride` apart
  int64_t gate_stride;
  float* out;
  int64_t out_stride;
};

// Attention of `n_rows` query rows that share one KV head, over positions [begin, end). Row r
// belongs to token r / group and sees positions up to pos0 + r / group.
struct AttentionTile {
  const float* const* q;  // n_rows pointers to head_dim floats
  int n_rows, group, head_dim;
  int64_t pos0, begin, end;
  float scale;
  const uint8_t *k, *v;  // this KV head's rows
  Type k_type, v_type;
  int64_t k_row, v_row;    // bytes
  float* work;             // attention_work(head_dim) floats
  float *acc, *max, *sum;  // (n_rows, head_dim), (n_rows), (n_rows): unnormalised result
};
constexpr int kKeyBlock = 64;   // positions per update of the maximum
constexpr int kQueryRows = 32;  // limit on the rows of a tile
constexpr int kMaxKeys = 8;     // limit on the keys decoded together
// Floats of work memory: queries and keys, scores of a block, a strip of values, a strip of
// results, four numbers per row.
static inline int64_t attention_work(int head_dim) {
  const int64_t dim = (head_dim + 31) / 32 * 32;
  return dim * (kQueryRows + kMaxKeys) + (kKeyBlock + kMaxKeys) * kQueryRows + kKeyBlock * 32 +
         kQueryRows * (32 + 4) + 16;
}

struct Kernels {
  const char* name;

  // Rounds n values of a row, from column `first` on, to 8 bits in its record. In each block of 32,
  // d = max|x| / 127. first and n are multiples of 32.
  void (*quantize)(const float* x, int64_t first, int64_t n, uint8_t* record, int64_t cols);
  // Multiplies every row of x by every row of the panels.
  void (*matmul)(const Weights& w, const PanelRange& panels, const Rows& x, const Results& y,
                 const Tile& tile);
  // The same for two matrices w and v of one shape and type. Their panels alternate in memory. y is
  // the product with w, z the product with v.
  void (*matmul_pair)(const Weights& w, const Weights& v, const PanelRange& panels, const Rows& x,
                      const Results& y, const Results& z, const Tile& tile);

  // Runs `rounds` of integer dot products on registers, and returns the number of products. Their
  // rate is the limit of any matrix kernel of this instruction set.
  int64_t (*dot_peak)(int64_t rounds, int32_t* result);
  // The same for float32 multiply-adds.
  int64_t (*float_peak)(int64_t rounds, float* result);

  void (*rms_norm)(const float* x, const float* w, int n, float eps, float* y);
  void (*gated_norm)(const float* x, const float* z, const float* w, int n, float eps, float* y);
  void (*unit_norm)(float* x, int n, float eps, float scale);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  void (*sigmoid_gate)(const float* x, const float* gate, int64_t n, bool per_row, float* y);
  void (*add)(const float* x, const float* y, int64_t n, float* out);
  void (*axpy)(float a, const float* x, int64_t n, float* y);
  // Convolution and SiLU for some channels of n tokens. x and y are (n, channels), y's rows `ldy`
  // floats apart. The taps w are (kernel, channels), the state is (kernel - 1, channels); the rows
  // of both are `width` floats apart. The state advances.
  void (*conv_silu)(const float* x, int n, int channels, int kernel, const float* w, int64_t width,
                    float* state, float* y, int64_t ldy);
  // For n heads, in place: a becomes the decay e^(ssm_a softplus(a + dt_bias)), b becomes
  // sigmoid(b).
  void (*delta_gates)(float* a, float* b, const float* ssm_a, const float* dt_bias, int n);
  void (*gated_delta)(const DeltaSlice& s);
  void (*store_kv)(const float* x, int n, Type type, uint8_t* dst);
  void (*attention)(const AttentionTile& t);
  // The k largest of n logits and their softmax. Of equal logits the lower index comes first.
  void (*route)(const float* logits, int n, int k, float* ids, float* weights);
};

// One definition per compiled instruction set; dispatch.cpp lists them.
extern const Kernels kernels_scalar;
#if defined(DESKSIDE_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
#if defined(DESKSIDE_EMULATE_AVX512)
extern const Kernels kernels_avx512_emulated;  // the same sources on AVX2 (emulate_avx512.h)
#endif

}  // namespace deskside
