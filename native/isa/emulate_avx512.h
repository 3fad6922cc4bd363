// Emulates the AVX-512 intrinsics that the kernels use, on 256-bit registers. Most are SIMDe's;
// those below are missing in SIMDe 0.7.4. They test the AVX-512 kernels on machines without
// AVX-512, and are never in the wheel (CMakeLists.txt, DESKSIDE_EMULATE_AVX512). Everything here
// has internal linkage.
//
// <immintrin.h> must come first: it declares the types and the functions that the macros replace.
#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/blend.h>
#include <simde/x86/avx512/broadcast.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/mov_mask.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/shuffle.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/srl.h>
#include <simde/x86/avx512/srli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/ternarylogic.h>

namespace deskside {
namespace {

struct Integers {
  __m256i low, high;
};
struct Floats {
  __m256 low, high;
};
inline __m512i join(__m256i low, __m256i high) {
  return __builtin_bit_cast(__m512i, (Integers{low, high}));
}
inline __m512 join(__m256 low, __m256 high) {
  return __builtin_bit_cast(__m512, (Floats{low, high}));
}

inline __m512i emulated_cvtepu8_epi32(__m128i a) {
  return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
inline __m512i emulated_cvtepi8_epi32(__m128i a) {
  return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
inline __m512i emulated_cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512 emulated_cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m512 emulated_cvtepi32_ps(__m512i a) {
  const auto half = __builtin_bit_cast(Integers, a);
  return join(_mm256_cvtepi32_ps(half.low), _mm256_cvtepi32_ps(half.high));
}
inline __m512i emulated_cvtps_epi32(__m512 a) {
  const auto half = __builtin_bit_cast(Floats, a);
  return join(_mm256_cvtps_epi32(half.low), _mm256_cvtps_epi32(half.high));
}
// The lowest byte of each lane.
inline __m128i emulated_cvtepi32_epi8(__m512i a) {
  alignas(64) int32_t lane[16];
  alignas(16) int8_t byte[16];
  __builtin_memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; i++) byte[i] = int8_t(lane[i]);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(byte));
}

}  // namespace
}  // namespace deskside

// A newer SIMDe may define some of these.
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
