// Vectors of floats as wide as the machine's registers, and the few functions of them that a decoder needs.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__)
constexpr int LANES = 16;
constexpr int ROWS = 12;  // rows of a register tile: 12 x 2 accumulators of 32 registers
#else
constexpr int LANES = 8;
constexpr int ROWS = 3;  // 3 x 4 accumulators of 16 registers
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

// Attention works on eight lanes everywhere: heads and blocks are multiples of eight.
typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightInts __attribute__((vector_size(32)));

static inline Eight load8(const float* p) { return *(const LooseEight*)p; }
static inline void store8(float* p, Eight v) { *(LooseEight*)p = v; }
static inline Eight fill8(float x) { return Eight{x, x, x, x, x, x, x, x}; }

static inline float sum8(Eight v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static inline float max8(Eight v) {
  float best = v[0];
  for (int i = 1; i < 8; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x to about 2 ulp; exactly 0 below -87, where the result would be subnormal.
static inline Eight exp8(Eight x) {
  const Eight kept = (Eight)_mm256_min_ps((__m256)_mm256_max_ps((__m256)x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const Eight n = (Eight)_mm256_round_ps((__m256)(kept * fill8(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Eight r = (kept - n * fill8(0.693359375f)) + n * fill8(2.12194440e-4f);
  Eight p = fill8(1.9875691500e-4f);
  p = p * r + fill8(1.3981999507e-3f);
  p = p * r + fill8(8.3334519073e-3f);
  p = p * r + fill8(4.1665795894e-2f);
  p = p * r + fill8(1.6666665459e-1f);
  p = p * r + fill8(5.0000001201e-1f);
  p = (p * r) * r + r + fill8(1.0f);
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  const Eight scaled = (Eight)_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256((__m256)p), power));
  return (Eight)_mm256_and_ps((__m256)scaled, _mm256_cmp_ps((__m256)x, _mm256_set1_ps(-87.0f), _CMP_GE_OQ));
}

// The largest magnitude.
static inline float largest(const float* x, long n) {
  const Eight sign = fill8(-0.0f);
  Eight best = fill8(0.0f);
  long i = 0;
  for (; i + 8 <= n; i += 8)
    best = (Eight)_mm256_max_ps((__m256)best, _mm256_andnot_ps((__m256)sign, (__m256)load8(x + i)));
  float top = max8(best);
  for (; i < n; ++i) top = fmaxf(top, fabsf(x[i]));
  return top;
}
