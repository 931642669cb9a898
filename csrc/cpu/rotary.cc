// Rotary embedding: of queries in place, and of keys on their way into the paged cache.
#include <omp.h>

#include <cmath>

#include "cpu/scratch.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

// out [D] float32 = rotate(norm(head)); half-split pairs (i, i + D/2) as in Llama.
template <class T>
void rotate_head(const T* head, const float* cos_sin, const float* norm, float eps, int64_t d,
                 float* out) {
  float scale = 1.0f;
  if (norm) {
    float squares = 0.0f;
    for (int64_t i = 0; i < d; ++i) squares += to_float(head[i]) * to_float(head[i]);
    scale = 1.0f / std::sqrt(squares / float(d) + eps);
  }
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    float a = to_float(head[i]), b = to_float(head[i + half]);
    if (norm) a = a * scale * norm[i], b = b * scale * norm[i + half];
    const float c = cos_sin[i], s = cos_sin[half + i];
    out[i] = a * c - b * s;
    out[i + half] = b * c + a * s;
  }
}

template <class T>
void rotate_rows(const RotateArgs& args) {
  const int64_t d = args.head_dim, width = args.heads * d;
#pragma omp parallel if (args.kept * width >= 16 << 10)
  {
    static thread_local Scratch scratch;
    float* turned = scratch.take<float>(d);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < args.kept; ++r) {
      const int32_t position = args.positions[args.rows ? args.rows[r] : r];
      T* q = static_cast<T*>(args.q) + r * width;
      for (int64_t h = 0; h < args.heads; ++h) {
        rotate_head(q + h * d, args.cos_sin + position * d, args.norm, args.eps, d, turned);
        for (int64_t i = 0; i < d; ++i) from_float(turned[i], q + h * d + i);
      }
    }
  }
}

// Index of element (token t, channel i) of one head's block of keys or values.
template <class T>
int64_t key_index(int64_t t, int64_t i);
template <>
int64_t key_index<float>(int64_t t, int64_t i) {
  return i * kBlock + t;
}
template <>
int64_t key_index<bf16>(int64_t t, int64_t i) {
  return (i / 2 * kBlock + t) * 2 + i % 2;
}

template <class T>
int64_t value_index(int64_t t, int64_t i);
template <>
int64_t value_index<float>(int64_t t, int64_t i) {
  return (i / 32 * kBlock + t) * 32 + i % 32;
}
template <>
int64_t value_index<bf16>(int64_t t, int64_t i) {
  return ((i / 32 * (kBlock / 2) + t / 2) * 32 + i % 32) * 2 + t % 2;
}

template <class T>
void append_rows(const AppendArgs& args) {
  const int64_t d = args.head_dim, padded = (d + kHeadPad - 1) / kHeadPad * kHeadPad;
  const int64_t width = args.heads * d;
#pragma omp parallel if (args.rows * width >= 8 << 10)
  {
    static thread_local Scratch scratch;
    float* turned = scratch.take<float>(d);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < args.rows; ++n) {
      const T* row = static_cast<const T*>(args.kv) + n * 2 * width;
      const int64_t block = args.slots[n] / kBlock, t = args.slots[n] % kBlock;
      for (int64_t h = 0; h < args.heads; ++h) {
        const int64_t base = (block * args.heads + h) * padded * kBlock;
        T* keys = static_cast<T*>(args.keys) + base;
        T* values = static_cast<T*>(args.values) + base;
        rotate_head(row + h * d, args.cos_sin + args.positions[n] * d, args.key_norm, args.eps, d,
                    turned);
        const T* value = row + width + h * d;
        for (int64_t i = 0; i < d; ++i) from_float(turned[i], keys + key_index<T>(t, i));
        for (int64_t i = 0; i < d; ++i) values[value_index<T>(t, i)] = value[i];
      }
    }
  }
}

}  // namespace

void rotate(const RotateArgs& args) {
  args.dtype == DType::kBFloat16 ? rotate_rows<bf16>(args) : rotate_rows<float>(args);
}

void append(const AppendArgs& args) {
  args.dtype == DType::kBFloat16 ? append_rows<bf16>(args) : append_rows<float>(args);
}

}  // namespace pyrt::PYRT_ISA
