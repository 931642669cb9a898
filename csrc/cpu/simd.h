// Sixteen float32 lanes on any instruction set: GCC vector extensions, which the compiler splits
// where registers are narrower, and the few instructions it cannot find by itself.
// Everything lives in a namespace per instruction set: the same source is compiled several times
// and no inline function of a wide build may be linked into a narrow one.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/plan.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PYRT_ISA
#define PYRT_ISA portable
#endif

namespace pyrt::PYRT_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// Rows of a register tile: tile accumulators (two vectors a row) must fit the register file.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif

// Lane by lane, which is one broadcast; zeros plus the value would be an addition each time.
inline f32x16 splat(float value) {
  return f32x16{value, value, value, value, value, value, value, value,
                value, value, value, value, value, value, value, value};
}

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline f32x16 widen(u16x16 half) { return (f32x16)(__builtin_convertvector(half, u32x16) << 16); }

inline u16x16 narrow(f32x16 v) {
#if defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  u32x16 bits = (u32x16)v;
  u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  u32x16 quiet = bits | 0x400000;  // rounding must not turn a NaN into infinity
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, u16x16);
#endif
}

inline f32x16 load(const float* p) { return load_as<f32x16>(p); }
inline f32x16 load(const bf16* p) { return widen(load_as<u16x16>(p)); }
inline void store(float* p, f32x16 v) { store_as(p, v); }
inline void store(bf16* p, f32x16 v) { store_as(p, narrow(v)); }

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, bf16* out) {
  u16x16 half = narrow(splat(v));
  *out = half[0];
}

// First 0 <= `count` <= 16 lanes only; the others read as zero and are not written.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline f32x16 load_part(const float* p, int64_t count) {
  return (f32x16)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline f32x16 load_part(const bf16* p, int64_t count) {
  return widen((u16x16)_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline void store_part(float* p, f32x16 v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}
inline void store_part(bf16* p, f32x16 v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)narrow(v));
}
#else
template <class T>
inline f32x16 load_part(const T* p, int64_t count) {
  f32x16 v{};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
inline void store_part(T* p, f32x16 v, int64_t count) {
  T lanes[16];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}
#endif

// Lanes folded onto each other: 16 to 8 to 4 to 2 to 1, always in this order, so that a sum does
// not depend on how many rows are in flight.
template <class F>
inline float fold(f32x16 v, F&& join) {
  v = join(v, __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = join(v, __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = join(v, __builtin_shuffle(v, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = join(v, __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
}
inline float sum(f32x16 v) {
  return fold(v, [](f32x16 a, f32x16 b) { return a + b; });
}
inline float max(f32x16 v) {
  return fold(v, [](f32x16 a, f32x16 b) { return a > b ? a : b; });
}

#if defined(__AVX512F__)
// Swaps rows and lanes. Elsewhere than on 512-bit registers, moving element by element is as fast.
inline void transpose(f32x16 (&rows)[16]) {
  const auto exchange = [&]<int D>() {  // the off-diagonal halves of every 2D x 2D block
    i32x16 upper, lower;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      upper[i] = i & D ? i - D + 16 : i, lower[i] = i & D ? i + 16 : i + D;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & D) continue;
      const f32x16 a = rows[i], b = rows[i + D];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + D] = __builtin_shuffle(a, b, lower);
    }
  };
  exchange.template operator()<8>();
  exchange.template operator()<4>();
  exchange.template operator()<2>();
  exchange.template operator()<1>();
}
#endif

inline f32x16 round_nearest(f32x16 v) {
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: the sum has no room for a fraction
  return (v + magic) - magic;
}

// e^x to 2 ulp; exactly 0 below -87, so that masked attention scores weigh nothing.
inline f32x16 exp(f32x16 x) {
  const f32x16 below = x < 88.0f ? x : splat(88.0f);
  const f32x16 clamped = below > -88.0f ? below : splat(-88.0f);  // NaN too; it comes back below
  const f32x16 n = round_nearest(clamped * 1.44269504088896341f);
  f32x16 r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const u32x16 exponent = (u32x16) __builtin_convertvector(n, i32x16) << 23;
  const f32x16 scaled = (f32x16)((u32x16)p + exponent);
  const f32x16 result = x < -87.0f ? splat(0.0f) : scaled;
  return x == x ? result : x;
}

inline f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exp(-x)); }
inline f32x16 silu(f32x16 x) { return x / (1.0f + exp(-x)); }

inline f32x16 relu(f32x16 x) { return x < 0.0f ? splat(0.0f) : x; }

// gpt-oss: the gate cut from above, its partner from both sides. Comparisons let a NaN through.
inline f32x16 swiglu_oai(f32x16 gate, f32x16 up, float alpha, float limit) {
  gate = gate > limit ? splat(limit) : gate;
  up = up > limit ? splat(limit) : up;
  up = up < -limit ? splat(-limit) : up;
  return (up + 1.0f) * (gate / (1.0f + exp(gate * -alpha)));
}

// The error-function form of GELU: relu(x) - |x| * Q(|x|), where Q is the upper tail of the normal
// distribution. Its fourth root is a polynomial up to 5.6 (beyond, |x| * Q < 7e-8), fitted so that
// the greatest error of Q is least: |error| of the result < 2.2e-7, with neither exp nor division.
inline f32x16 gelu(f32x16 x) {
  const f32x16 size = (f32x16)((u32x16)x & 0x7fffffffu);
  const f32x16 a = size < 5.6f ? size : splat(5.6f);
  f32x16 p = splat(3.454100579e-06f);
  p = p * a - 3.978464156e-05f;
  p = p * a + 8.838134818e-05f;
  p = p * a + 5.200564046e-04f;
  p = p * a - 8.684983477e-04f;
  p = p * a - 9.525096975e-03f;
  p = p * a - 3.138063941e-03f;
  p = p * a + 1.501600742e-01f;
  p = p * (5.6f - a);  // exactly 0 at the end, so that far left of 0 is 0
  p = p * p;
  return relu(x) - a * (p * p);
}

}  // namespace pyrt::PYRT_ISA
