// Cuts memory into aligned arrays. With a null base it only counts, and the arrays are null.
#pragma once

#include <cstdint>

namespace deskside {

class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <class T> T* take(int64_t n) {
    const int64_t at = used_;
    used_ += (n * int64_t(sizeof(T)) + 63) & ~int64_t(63);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }

  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace deskside
