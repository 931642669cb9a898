// What decides, in vectors of what the processor has: comparisons, which the compiler splits badly
// where it has to, and the operations of pyruntime/ops/reference/score.py, each rounded once. Only
// for files that are built with contraction off; exp here is apart from that of simd.h because that
// one is fused elsewhere.
#pragma once

#include <limits>

#include "cpu/simd.h"

namespace pyrt::PYRT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t ivec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t uvec __attribute__((vector_size(4 * kWidth)));

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kSumLanes = 32;  // of every sum over a row
constexpr int kSumVecs = kSumLanes / kWidth;

inline ivec lanes() {
  ivec v{};
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}
inline vec all(float value) { return value - vec{}; }  // a sum would change the sign of a zero
inline vec at(const float* p) { return load_as<vec>(p); }
inline vec greater(vec a, vec b) { return a > b ? a : b; }
inline vec lesser(vec a, vec b) { return a > b ? b : a; }
template <class V>
inline V swapped(V v, int by) {
  return __builtin_shuffle(v, lanes() ^ by);
}
inline float largest_of(vec v) {
#pragma GCC unroll 4
  for (int by = kWidth / 2; by > 0; by /= 2) v = greater(v, swapped(v, by));
  return v[0];
}

// The first `count` lanes, then -inf.
inline vec some(const float* p, int64_t count) {
  if (count >= kWidth) return at(p);
  vec v = all(kNever);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

// The two largest of every column; after fold() of all, in every lane.
struct BestTwo {
  vec high = all(kNever), low = all(kNever);

  void take(vec value) {
    low = greater(low, lesser(high, value));
    high = greater(high, value);
  }
  void fold() {
#pragma GCC unroll 4
    for (int by = kWidth / 2; by > 0; by /= 2) {
      const vec other = swapped(high, by);
      low = greater(greater(low, swapped(low, by)), lesser(high, other));
      high = greater(high, other);
    }
  }
};

// Lane l adds l, l + 32, ...; then halves fold.
struct LaneSum {
  vec part[kSumVecs] = {};

  float fold() {
    for (int parts = kSumVecs / 2; parts > 0; parts /= 2)
      for (int i = 0; i < parts; ++i) part[i] += part[i + parts];
    vec total = part[0];
#pragma GCC unroll 4
    for (int by = kWidth / 2; by > 0; by /= 2) total += swapped(total, by);
    return total[0];
  }
};

// e^x to 2 ulp; 0 below -87, e^88 above 88; no NaN.
inline vec unfused_exp(vec x) {
  const vec below = x < 88.0f ? x : all(88.0f);
  const vec clamped = below > -88.0f ? below : all(-88.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction
  const vec n = (clamped * 1.44269504088896341f + magic) - magic;
  vec r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uvec exponent = (uvec) __builtin_convertvector(n, ivec) << 23;
  return x < -87.0f ? all(0.0f) : (vec)((uvec)p + exponent);
}

inline vec twice_atanh(vec w) {  // of |w| <= 1/3
  const vec q = w * w;
  vec p = all(1.0f / 15);
  for (float n = 13.0f; n > 0.0f; n -= 2.0f) p = p * q + 1.0f / n;
  return (w + w) * p;
}

inline vec unfused_log1p(vec u) { return twice_atanh(u / (2.0f + u)); }  // of u in [0, 1]

// Natural logarithm of finite x >= 1 to 2 ulp.
inline vec unfused_log(vec x) {
  const ivec exponent = ((ivec)x >> 23) - 127;
  const vec whole = (vec)((ivec)x - (exponent << 23));  // in [1, 2)
  const ivec high = whole > 1.4140625f;                 // -1 where true
  const vec part = high ? whole * 0.5f : whole;
  const vec n = __builtin_convertvector(exponent - high, vec);
  const vec p = twice_atanh((part - 1.0f) / (part + 1.0f)) + n * -2.12194440e-4f;
  return p + n * 0.693359375f;
}

inline vec unfused_sigmoid(vec x) { return 1.0f / (1.0f + unfused_exp(-x)); }

}  // namespace
}  // namespace pyrt::PYRT_ISA
