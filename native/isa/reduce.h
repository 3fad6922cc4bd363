// Many horizontal sums at once. Everything here has internal linkage.
#pragma once

#include "simd.h"

namespace deskside {
namespace {

// A list of ints as a type: std::integer_sequence without its header.
template <int...> struct Ints {};
template <int N, int... I> struct IntsTo : IntsTo<N - 1, N - 1, I...> {};
template <int... I> struct IntsTo<0, I...> {
  using type = Ints<I...>;
};
using Lanes = IntsTo<kLanes>::type;

// Adds neighbouring lanes in pairs, of a and then of b: (a0 + a1, a2 + a3, .., b0 + b1, ..).
template <int... I> inline vf add_pairs(vf a, vf b, Ints<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
inline vf add_pairs(vf a, vf b) { return add_pairs(a, b, Lanes{}); }

// Sums groups of G neighbouring lanes (a power of two) of N vectors. The results fill a[0 .. N /
// G), in order.
template <int G, int N> inline void add_groups(vf* a) {
  if constexpr (G > 1) {
    static_assert(N % 2 == 0);
    for (int i = 0; i < N / 2; i++) a[i] = add_pairs(a[2 * i], a[2 * i + 1]);
    add_groups<G / 2, N / 2>(a);
  }
}

}  // namespace
}  // namespace deskside
