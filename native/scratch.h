// Cuts an op's shared scratch memory into aligned arrays. With a null base it only counts.
#pragma once

#include <cstdint>

#include "program.h"

namespace deskside {

class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <class T> T* take(int64_t n) {
    const int64_t at = used_;
    used_ += (n * int64_t(sizeof(T)) + 63) & ~int64_t(63);
    return reinterpret_cast<T*>(base_ + at);
  }

  // Room for n rows of activations in 8 bits.
  Rows rows(int64_t n, int64_t cols, const float* f) {
    int8_t* q = take<int8_t>(n * cols);
    float* d = take<float>(n * (cols / 32));
    float* s = take<float>(n * (cols / 32));
    return {f, q, d, s, cols};
  }

  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

// Rounds rows of x to 8 bits in parallel; follow with a barrier.
inline void quantize_rows(const Run& r, const Rows& x, int64_t n) {
  r.team.for_each(n, [&](int64_t i) {
    r.kernels.quantize_row(x.f + i * x.cols, x.cols, x.q + i * x.cols, x.d + i * (x.cols / 32),
                           x.s + i * (x.cols / 32));
  });
}

}  // namespace deskside
