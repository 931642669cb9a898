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

// First `count` lanes only; the others read as zero and are not written.
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

// The error-function form of GELU, by Abramowitz and Stegun 7.1.26 (|error| < 1.5e-7).
inline f32x16 gelu(f32x16 x) {
  const f32x16 magnitude = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const f32x16 t = 1.0f / (1.0f + 0.3275911f * magnitude);
  f32x16 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const f32x16 erf = 1.0f - p * t * exp(-magnitude * magnitude);
  return 0.5f * x * (1.0f + (x < 0.0f ? -erf : erf));
}

}  // namespace pyrt::PYRT_ISA
