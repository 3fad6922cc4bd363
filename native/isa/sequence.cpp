// The small kernels (norms, gates, convolution, routing) and the table of all kernels. Compiled
// once per instruction set (DESKSIDE_ISA).
#include "matmul_entry.h"
#include "sequence_entry.h"
#include "simd.h"

#include <math.h>

namespace deskside {
namespace {

// Applies f to rows of floats, vector by vector. The last floats go through zero-padded copies.
template <class F> inline void each(int64_t n, const float* a, const float* b, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i), load(b + i)));
  if (i < n) {
    float pa[kLanes] = {}, pb[kLanes] = {}, py[kLanes];
    memcpy(pa, a + i, size_t(n - i) * 4);
    memcpy(pb, b + i, size_t(n - i) * 4);
    store(py, f(load(pa), load(pb)));
    memcpy(y + i, py, size_t(n - i) * 4);
  }
}

int64_t float_peak(int64_t rounds, float* result) {
  constexpr int kSums = 12;  // enough to hide the latency of a multiply-add
  vf sum[kSums], w = splat(1.0f), x = splat(0.5f);
  for (int i = 0; i < kSums; i++) sum[i] = splat(1.0f + i);
  for (int64_t r = 0; r < rounds; r++) {
    // To the compiler the operands change each time, as in dot_peak.
#if defined(__x86_64__) && !defined(DESKSIDE_EMULATED)
    asm volatile("" : "+v"(x), "+v"(w));
#endif
    for (int i = 0; i < kSums; i++) sum[i] = sum[i] * x + w;
  }
  for (int i = 1; i < kSums; i++) sum[0] += sum[i];
  *result = sum[0][0];
  return rounds * kSums * kLanes;
}

float inverse_rms(const float* x, int n, float eps) { return 1.0f / sqrtf(dot(x, x, n) / n + eps); }

void rms_norm(const float* x, const float* w, int n, float eps, float* y) {
  const float scale = inverse_rms(x, n, eps);
  each(n, x, w, y, [scale](vf a, vf b) { return a * scale * b; });
}

void gated_norm(const float* x, const float* z, const float* w, int n, float eps, float* y) {
  const float scale = inverse_rms(x, n, eps);
  each(n, x, w, y, [scale](vf a, vf b) { return a * scale * b; });
  each(n, y, z, y, [](vf a, vf g) { return a * g * vsigmoid(g); });
}

void unit_norm(float* x, int n, float eps, float scale) {
  const float s = scale / sqrtf(dot(x, x, n) + eps);
  each(n, x, x, x, [s](vf a, vf) { return a * s; });
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  each(n, gate, up, y, [](vf g, vf u) { return g * vsigmoid(g) * u; });
}

void sigmoid_gate(const float* x, const float* gate, int64_t n, bool per_row, float* y) {
  if (per_row) {
    const float s = sigmoid1(*gate);
    each(n, x, x, y, [s](vf a, vf) { return a * s; });
  } else {
    each(n, x, gate, y, [](vf a, vf g) { return a * vsigmoid(g); });
  }
}

void add(const float* x, const float* y, int64_t n, float* out) {
  each(n, x, y, out, [](vf a, vf b) { return a + b; });
}

void axpy(float a, const float* x, int64_t n, float* y) {
  each(n, x, y, y, [a](vf u, vf v) { return v + a * u; });
}

void delta_gates(float* a, float* b, const float* ssm_a, const float* dt_bias, int n) {
  each(n, a, dt_bias, a, [](vf x, vf bias) { return vsoftplus(x + bias); });
  each(n, a, ssm_a, a, [](vf x, vf rate) { return vexp(rate * x); });
  each(n, b, b, b, [](vf x, vf) { return vsigmoid(x); });
}

void conv_silu(const float* x, int n, int channels, int kernel, const float* w, int64_t width,
               float* state, float* y, int64_t ldy) {
  // Input t of this call. Inputs with t < 0 are in the state, oldest first.
  const auto input = [&](int t) {
    return t < 0 ? state + int64_t(kernel - 1 + t) * width : x + int64_t(t) * channels;
  };
  for (int t = 0; t < n; t++) {
    float* out = y + int64_t(t) * ldy;
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      vf s = vf{};
      for (int j = 0; j < kernel; j++)
        s += load(w + int64_t(j) * width + c) * load(input(t - kernel + 1 + j) + c);
      store(out + c, s * vsigmoid(s));
    }
    for (; c < channels; c++) {
      float s = 0;
      for (int j = 0; j < kernel; j++)
        s += w[int64_t(j) * width + c] * input(t - kernel + 1 + j)[c];
      out[c] = s * sigmoid1(s);
    }
  }
  // Rows ascend, so each row is read before it is overwritten.
  for (int j = 0; j < kernel - 1; j++)
    memmove(state + int64_t(j) * width, input(n - kernel + 1 + j), size_t(channels) * 4);
}

// ---- routing ------------------------------------------------------------------------------------

void route(const float* logits, int n, int k, float* ids, float* weights) {
  // Inserts into the k largest so far. The comparison is strict: of equals the lower index is
  // first.
  int found = 0;
  for (int e = 0; e < n; e++) {
    const float x = logits[e];
    if (found == k && !(x > weights[k - 1])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x > weights[at - 1]; at--) {
      weights[at] = weights[at - 1];
      ids[at] = ids[at - 1];
    }
    weights[at] = x;
    ids[at] = float(e);
  }
  const float top = weights[0];
  float total = 0;
  for (int i = 0; i < k; i++) total += weights[i] = expf(weights[i] - top);
  for (int i = 0; i < k; i++) weights[i] /= total;
}

}  // namespace

#define DESKSIDE_CONCAT(a, b) a##b
#define DESKSIDE_TABLE(isa) DESKSIDE_CONCAT(kernels_, isa)
#define DESKSIDE_STRING(x) #x
#define DESKSIDE_NAME(isa) DESKSIDE_STRING(isa)

extern const Kernels DESKSIDE_TABLE(DESKSIDE_ISA) = {
    DESKSIDE_NAME(DESKSIDE_ISA),
    DESKSIDE_ISA::quantize,
    DESKSIDE_ISA::matmul,
    DESKSIDE_ISA::matmul_pair,
    DESKSIDE_ISA::dot_peak,
    float_peak,
    rms_norm,
    gated_norm,
    unit_norm,
    swiglu,
    sigmoid_gate,
    add,
    axpy,
    conv_silu,
    delta_gates,
    DESKSIDE_ISA::gated_delta,
    DESKSIDE_ISA::store_kv,
    DESKSIDE_ISA::attention,
    route,
};

}  // namespace deskside
