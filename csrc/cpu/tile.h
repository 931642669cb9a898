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
  static inline __m512bh panel(u32x16 pairs) { return (__m512bh)pairs; }
  static inline void multiply(f32x16& lo, f32x16& hi, const bf16* a, __m512bh b0, __m512bh b1) {
    int32_t word;
    std::memcpy(&word, a, 4);
    const __m512bh value = (__m512bh)_mm512_set1_epi32(word);
    lo = (f32x16)_mm512_dpbf16_ps((__m512)lo, value, b0);
    hi = (f32x16)_mm512_dpbf16_ps((__m512)hi, value, b1);
  }
#else
  static inline u32x16 panel(const bf16* p) { return load_as<u32x16>(p); }
  static inline u32x16 panel(u32x16 pairs) { return pairs; }
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

// ---- int8 weights: bf16 panels of one byte each, [steps][32][2] ----
// An integer up to 127 is a bf16, so a weight is multiplied as exactly what it is, and where it is
// converted (in registers, or once for many rows) changes no bit of a sum.

// 32 columns of two steps of K as bf16 pairs, in whatever order of columns is cheapest.
#if defined(__AVX512VBMI__)
// The bytes of the bf16 of 0 .. 127 lie in registers: half as many instructions as through float.
struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
  constexpr ByteTable() : low(), high() {
    for (int q = 1; q < 128; ++q) {
      int exponent = 0;
      while (q >> (exponent + 1)) ++exponent;
      const int bits = (127 + exponent) << 7 | (q << (7 - exponent) & 127);
      low[q] = uint8_t(bits);
      high[q] = uint8_t(bits >> 8);
    }
  }
};
inline constexpr ByteTable kBytes;

inline void widen_pairs(const int8_t* q, u32x16& first, u32x16& second) {
  const __m512i bytes = _mm512_loadu_si512(q);
  // Not vpabsb, which takes the place of products (measured).
  const __m512i size = _mm512_min_epu8(bytes, _mm512_sub_epi8(_mm512_setzero_si512(), bytes));
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.low), size,
                                               _mm512_load_si512(kBytes.low + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.high), size,
                                                _mm512_load_si512(kBytes.high + 64));
  const __m512i with_sign =  // high | (bytes & 0x80)
      _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), 0xf8);
  first = (u32x16)_mm512_unpacklo_epi8(low, with_sign);
  second = (u32x16)_mm512_unpackhi_epi8(low, with_sign);
}

// The order of columns that the unpacking inside 128-bit lanes left, undone.
inline void restore_columns(f32x16& lo, f32x16& hi) {
  const f32x16 a = lo, b = hi;
  lo = __builtin_shuffle(a, b, i32x16{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
  hi =
      __builtin_shuffle(a, b, i32x16{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
}
#else
inline u32x16 widen_pair(const int8_t* q) {
  const u32x16 pair = __builtin_convertvector(load_as<u16x16>(q), u32x16);
  const i32x16 even = (i32x16)(pair << 24) >> 24, odd = (i32x16)(pair << 16) >> 24;
  return ((u32x16) __builtin_convertvector(even, f32x16) >> 16) |
         (u32x16) __builtin_convertvector(odd, f32x16);  // whose lower half is 0
}

inline void widen_pairs(const int8_t* q, u32x16& first, u32x16& second) {
  first = widen_pair(q);
  second = widen_pair(q + 32);
}

inline void restore_columns(f32x16&, f32x16&) {}
#endif

inline f32x16 even_of(u32x16 pairs) { return (f32x16)(pairs << 16); }
inline f32x16 odd_of(u32x16 pairs) { return (f32x16)(pairs & 0xffff0000u); }

// `tile` of int8 weights: same products, same order; a holds 2 * steps of K. The columns of acc are
// in the order of widen_pairs.
template <class T, int M>
inline void tile(const T* a, const int8_t* b, int64_t steps, f32x16 (&acc)[M][2]) {
  using S = Step<T>;
  f32x16 c[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) c[m][0] = acc[m][0], c[m][1] = acc[m][1];
  for (int64_t k = 0; k < steps; ++k, a += 2 * M, b += 64) {
    u32x16 w0, w1;
    widen_pairs(b, w0, w1);
    if constexpr (S::kDepth == 2) {
      const auto b0 = S::panel(w0), b1 = S::panel(w1);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) S::multiply(c[m][0], c[m][1], a + 2 * m, b0, b1);
    } else {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) S::multiply(c[m][0], c[m][1], a + m, even_of(w0), even_of(w1));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) S::multiply(c[m][0], c[m][1], a + M + m, odd_of(w0), odd_of(w1));
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m][0] = c[m][0], acc[m][1] = c[m][1];
}

// Up to so many rows converting on the way to every tile costs less than converting a panel once
// (measured): pairs from the table hide behind the products altogether.
#if defined(__AVX512VBMI__)
template <class T>
constexpr int64_t kConvertRows = sizeof(T) == 2 ? INT64_MAX : 2 * kTileRows;
#else
template <class T>
constexpr int64_t kConvertRows = kTileRows;
#endif

// A panel of int8 as one of T, in the order of columns of widen_pairs.
inline void widen_panel(const int8_t* from, int64_t steps, bf16* to) {
  for (int64_t k = 0; k < steps; ++k, from += 64, to += 64) {
    u32x16 w0, w1;
    widen_pairs(from, w0, w1);
    store_as(to, w0);
    store_as(to + 32, w1);
  }
}
inline void widen_panel(const int8_t* from, int64_t steps, float* to) {
  for (int64_t k = 0; k < steps; ++k, from += 64, to += 64) {
    u32x16 w0, w1;
    widen_pairs(from, w0, w1);
    store(to, even_of(w0));
    store(to + 16, even_of(w1));
    store(to + 32, odd_of(w0));
    store(to + 48, odd_of(w1));
  }
}

// Rows side by side, one step of K after another; an odd K of bf16 is completed by a zero.
template <class T>
inline void pack_rows(const T* const* rows, int count, int64_t depth, T* out) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t whole = depth / d;
  int64_t k = 0;
#if defined(__AVX512F__)  // a step is 32 bits; few rows are as fast element by element
  for (; count > 4 && k + 16 <= whole; k += 16) {
    f32x16 block[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) block[m] = m < count ? load_as<f32x16>(rows[m] + k * d) : f32x16{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, out += count * d)
      store_part(reinterpret_cast<float*>(out), block[i], count);
  }
#endif
  for (; k < whole; ++k)
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
