// Rows of activations into the panels of the tile, on the way: keys are transposed, values are not.
#pragma once

#include <algorithm>

#include "cpu/tile.h"

namespace pyrt::PYRT_ISA {

constexpr int64_t kColumns = 32;  // of a panel

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Two vectors shuffled together: the lower halves, the upper halves.
constexpr i32x16 kLowZip = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr i32x16 kHighZip = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

#if defined(__AVX512BW__)
// Word j of row i becomes word i of row j: four times the halves of the rows are shuffled together.
inline void transpose(u32x16 (&r)[16]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    u32x16 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + 8], kLowZip);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + 8], kHighZip);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
}

// The first `count` elements, then zeros; nothing is read beyond.
inline u32x16 load_words(const float* p, int64_t count) {
  return (u32x16)_mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1u << count) - 1, p);
}
inline u32x16 load_words(const bf16* p, int64_t count) {
  return (u32x16)_mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
}

// keys [n] to panels [steps of D][32 keys].
template <class T>
void pack_keys(const T* from, int64_t stride, int64_t count, int64_t dim, T* to) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t steps = (dim + d - 1) / d;
  for (int64_t key = 0; key < count; key += 16) {
    T* half = to + key / kColumns * steps * kColumns * d + key % kColumns * d;
    for (int64_t step = 0; step < steps; step += 16) {
      u32x16 r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = key + i < count ? load_words(from + (key + i) * stride + step * d, dim - step * d)
                               : u32x16{};
      transpose(r);
      T* out = half + step * kColumns * d;
      if (steps - step >= 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store_as(out + i * kColumns * d, r[i]);
      } else {
        for (int i = 0; i < steps - step; ++i) store_as(out + i * kColumns * d, r[i]);
      }
    }
  }
}

inline void pack_step(const float* row, const float*, int64_t columns, float* to) {
  store_as(to, load_words(row, columns));
  store_as(to + 16, load_words(row + (columns > 16 ? 16 : 0), std::max<int64_t>(columns - 16, 0)));
}
inline void pack_step(const bf16* even, const bf16* odd, int64_t columns, bf16* to) {
  typedef uint16_t u16x32 __attribute__((vector_size(64)));
  const u16x32 a = (u16x32)load_words(even, columns);
  const u16x32 b = odd ? (u16x32)load_words(odd, columns) : u16x32{};
  store_as(to, __builtin_shuffle(
                   a, b, u16x32{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47}));
  store_as(to + 32, __builtin_shuffle(a, b, u16x32{16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                   53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                   27, 59, 28, 60, 29, 61, 30, 62, 31, 63}));
}
#else
template <class T>
void pack_keys(const T* from, int64_t stride, int64_t count, int64_t dim, T* to) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t size = round_up(dim, d) * kColumns;
  std::fill_n(to, round_up(count, kColumns) / kColumns * size, T(0));
  for (int64_t key = 0; key < count; ++key) {
    T* out = to + key / kColumns * size + key % kColumns * d;
    const T* row = from + key * stride;
    for (int64_t i = 0; i < dim; ++i) out[i / d * kColumns * d + i % d] = row[i];
  }
}

inline void pack_step(const float* row, const float*, int64_t columns, float* to) {
  for (int64_t i = 0; i < kColumns; ++i) to[i] = i < columns ? row[i] : 0.0f;
}
inline void pack_step(const bf16* even, const bf16* odd, int64_t columns, bf16* to) {
  for (int64_t i = 0; i < kColumns; ++i) {
    to[2 * i] = i < columns ? even[i] : 0;
    to[2 * i + 1] = i < columns && odd ? odd[i] : 0;
  }
}
#endif

// values [n] to panels [steps of n][32 columns].
template <class T>
void pack_values(const T* from, int64_t stride, int64_t count, int64_t dim, T* to) {
  constexpr int64_t d = Step<T>::kDepth;
  for (int64_t column = 0; column < dim; column += kColumns)
    for (int64_t k = 0; k < count; k += d, to += kColumns * d) {
      const T* row = from + k * stride + column;
      pack_step(row, d == 2 && k + 1 < count ? row + stride : nullptr,
                std::min(dim - column, kColumns), to);
    }
}

// A row and zeros up to `words`.
template <class T>
inline void copy_row(const T* row, int64_t dim, int64_t words, T* to) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kLine <= dim; i += kLine) std::memcpy(to + i, row + i, 64);
  for (; i < dim; ++i) to[i] = row[i];
  for (; i < words; ++i) to[i] = 0;
}

}  // namespace pyrt::PYRT_ISA
