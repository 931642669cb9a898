// The one inner loop: a register tile of M rows times 32 columns, accumulated over K in one fixed
// order. An output never depends on how many rows share its tile, so a row's result is the same
// bits in a batch of one and in a batch of thousands. Matmul and both halves of attention use it.
#pragma once

#include "cpu/simd.h"

namespace pyrt::PYRT_ISA {

// What one step of K is: one float, or a pair of bf16 held in a 32-bit word.
template <class T>
struct Step;

template <>
struct Step<float> {
  static constexpr int kDepth = 1;
  static inline void multiply(f32x16& lo, f32x16& hi, const float* a, f32x16 b0, f32x16 b1) {
    const f32x16 value = splat(*a);
    lo += value * b0;
    hi += value * b1;
  }
  static inline f32x16 panel(const float* p) { return load(p); }
};

template <>
struct Step<bf16> {
  static constexpr int kDepth = 2;
#if defined(__AVX512BF16__)
  static inline __m512bh panel(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline void multiply(f32x16& lo, f32x16& hi, const bf16* a, __m512bh b0, __m512bh b1) {
    int32_t word;
    std::memcpy(&word, a, 4);
    const __m512bh value = (__m512bh)_mm512_set1_epi32(word);
    lo = (f32x16)_mm512_dpbf16_ps((__m512)lo, value, b0);
    hi = (f32x16)_mm512_dpbf16_ps((__m512)hi, value, b1);
  }
#else
  static inline u32x16 panel(const bf16* p) { return load_as<u32x16>(p); }
  static inline void multiply(f32x16& lo, f32x16& hi, const bf16* a, u32x16 b0, u32x16 b1) {
    const f32x16 even = splat(to_float(a[0])), odd = splat(to_float(a[1]));
    lo += even * (f32x16)(b0 << 16);
    lo += odd * (f32x16)(b0 & 0xffff0000u);
    hi += even * (f32x16)(b1 << 16);
    hi += odd * (f32x16)(b1 & 0xffff0000u);
  }
#endif
};

// acc[m] += a[:, m] * b over `steps`. a is [steps][M] steps (rows side by side, see pack_rows),
// b is one panel [steps][32] steps.
template <class T, int M>
inline void tile(const T* a, const T* b, int64_t steps, f32x16 (&acc)[M][2]) {
  using S = Step<T>;
  constexpr int64_t d = S::kDepth;
  // A local copy that only unrolled code touches, or the compiler keeps the tile in memory.
  f32x16 c[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) c[m][0] = acc[m][0], c[m][1] = acc[m][1];
  for (int64_t k = 0; k < steps; ++k) {
    const auto b0 = S::panel(b), b1 = S::panel(b + 16 * d);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) S::multiply(c[m][0], c[m][1], a + m * d, b0, b1);
    a += M * d;
    b += 32 * d;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m][0] = c[m][0], acc[m][1] = c[m][1];
}

// Rows side by side, one step of K after another; an odd K of bf16 is completed by a zero.
template <class T>
inline void pack_rows(const T* const* rows, int count, int64_t depth, T* out) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t whole = depth / d;
  for (int64_t k = 0; k < whole; ++k)
    for (int m = 0; m < count; ++m, out += d) std::memcpy(out, rows[m] + k * d, d * sizeof(T));
  if (whole * d == depth) return;
  for (int m = 0; m < count; ++m, out += d) {
    out[0] = rows[m][depth - 1];
    out[1] = 0;
  }
}

// Calls f.template operator()<M>() for the run-time tile height.
template <int M = kTileRows, class F>
inline void with_rows(int rows, F&& f) {
  if constexpr (M > 1) {
    if (rows < M) return with_rows<M - 1>(rows, f);
  }
  f.template operator()<M>();
}

}  // namespace pyrt::PYRT_ISA
