// Attention inside ragged sequences of packed rows, every key seen by every query of its sequence.
//
// Per (sequence, head) the keys and values are packed once into the panels of the matmul; then a
// tile of query rows computes its scores of all keys, one exact softmax and its weighted sum. torch
// has no ragged kernel for the CPU: a call per sequence, or padding to the longest, and in bfloat16
// its matmuls reach no more than those of float32.
//
// A row's sums run over the features and over the keys of its own sequence in rising order, and a
// key that pads a panel weighs exactly 0: its bits depend on no other row and on no cut of the
// work.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/panels.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kThreadProducts = 1 << 20;   // fewer are done before another thread has woken
constexpr double kLog2E = 1.4426950408889634;  // the softmax is one in base 2
constexpr float kPackRows = 8;  // query rows that cost what packing the keys and values costs

// Calls done(m, lo, hi) with row m of a * b summed over `steps`, for rows that lie `stride`
// elements apart: the tile of the matmul without packing its rows. Of a panel's 32 columns 16 * N
// are wanted.
template <int N, int M, class T, class F>
inline void tile_rows(const T* a, int64_t stride, const T* b, int64_t steps, F&& done) {
  using S = Step<T>;
  constexpr int64_t d = S::kDepth;
  constexpr int kBases = (M + 2) / 3;  // three rows a pointer: base, base + stride, base + 2 stride
  const T* base[kBases];
#pragma GCC unroll 4
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * stride;
  f32x16 c[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) c[m][0] = c[m][1] = f32x16{};
  for (int64_t k = 0; k < steps; ++k, b += 32 * d) {
    const auto b0 = S::panel(b), b1 = S::panel(b + (N == 2 ? 16 * d : 0));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      f32x16 unused{};
      S::multiply(c[m][0], N == 2 ? c[m][1] : unused, base[m / 3] + m % 3 * stride, b0, b1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += d;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) done(m, c[m][0], c[m][1]);
}

// 2^x for x <= 0, exactly 0 far below and 1 at 0; to 3e-6 where bfloat16 rounds it, else to 2 ulp.
template <class T>
inline f32x16 exp2(f32x16 x) {
#if defined(__AVX512DQ__)
  // Both instructions take x apart at its floor; -infinity leaves 0 here and 0 there, NaN stays.
  const f32x16 r = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const f32x16 clamped = x < -127.0f ? splat(-127.0f) : x;
  const f32x16 n = round_nearest(clamped - 0.5f), r = clamped - n;
#endif
  f32x16 p;  // of the least relative error on [0, 1]
  if constexpr (sizeof(T) == 2) {
    p = 1.34266848e-2f * r + 5.22424728e-2f;
    p = p * r + 2.41280198e-1f;
    p = p * r + 6.93044841e-1f;
  } else {
    p = 1.86713017e-3f * r + 9.01702978e-3f;
    p = p * r + 5.57999127e-2f;
    p = p * r + 2.40164444e-1f;
    p = p * r + 6.93151295e-1f;
  }
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return (f32x16)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
#else
  const f32x16 scaled = (f32x16)((i32x16)p + (__builtin_convertvector(n, i32x16) << 23));
  return x < -126.0f ? splat(0.0f) : scaled;
#endif
}

// Scores become weights 2^(score - peak), in place; returns what they sum up to.
template <class T>
inline f32x16 weigh(float* score, int64_t count, f32x16 peak) {
  T* weight = reinterpret_cast<T*>(score);  // never ahead of the scores that are still read
  f32x16 total{};
  int64_t key = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    for (; key + 16 < count; key += 32) {
      const f32x16 lo = exp2<T>(load(score + key) - peak);
      const f32x16 hi = exp2<T>(load(score + key + 16) - peak);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo);
      store_as(weight + key, both);
      total = (f32x16)_mm512_dpbf16_ps((__m512)total, both, (__m512bh)(u32x16{} + 0x3f803f80u));
    }
  }
#endif
  for (; key < count; key += 16) {
    const f32x16 p = exp2<T>(load(score + key) - peak);
    total += p;
    store(weight + key, p);
  }
  return total;
}

// What a thread keeps of one head of one sequence, and the tile of queries it works on.
template <class T>
struct Work {
  static constexpr int64_t d = Step<T>::kDepth;

  Work(int64_t count, int64_t head_dim, Scratch& scratch)
      : keys_count(count), dim(head_dim), steps((head_dim + d - 1) / d) {
    const int64_t padded = round_up(count, kColumns);
    stride = (padded / 16 | 1) * 16;  // an odd number of lines: rows spread over the cache's sets
    const int64_t key_words = padded * steps * d, query_words = kTileRows * steps * d;
    const int64_t value_words = round_up(count, d) * round_up(dim, kColumns);
    const int64_t floats = padded + kTileRows * stride;
    float* memory = scratch.take<float>(
        floats + (key_words + value_words + query_words) * int64_t(sizeof(T)) / 4 + 16);
    bias = memory;
    scores = bias + padded;
    keys = reinterpret_cast<T*>(scores + kTileRows * stride);
    values = keys + key_words;
    query = values + value_words;
  }

  int64_t keys_count, dim, steps;
  int64_t stride;  // of scores
  float* bias;     // [keys] times log2(e), then -inf
  float* scores;   // [tile rows][stride], overwritten by weights of T
  T* keys;         // [panels][steps of D][32]
  T* values;       // [panels][steps of keys][32]
  T* query;        // [tile rows][steps of D]
};

template <class T>
void pack(const VarlenArgs& args, int64_t first, int64_t head, const Work<T>& work) {
  const int64_t count = work.keys_count, dim = args.head_dim;
  pack_keys(static_cast<const T*>(args.k) + first * args.k_stride + head * dim, args.k_stride,
            count, dim, work.keys);
  pack_values(static_cast<const T*>(args.v) + first * args.v_stride + head * dim, args.v_stride,
              count, dim, work.values);
  for (int64_t i = 0; i < count; ++i)
    work.bias[i] = args.key_bias ? args.key_bias[first + i] * float(kLog2E) : 0.0f;
  std::fill(work.bias + count, work.bias + round_up(count, kColumns), -INFINITY);
}

// Asks for the rows of the next head little by little: all at once they would hold up the tile.
template <class T>
struct Ahead {
  Ahead() = default;
  Ahead(const VarlenArgs& args, int64_t i, int64_t head, int64_t moments)
      : q(static_cast<const T*>(args.q) + args.cu_q[i] * args.q_stride + head * args.head_dim),
        k(static_cast<const T*>(args.k) + args.cu_k[i] * args.k_stride + head * args.head_dim),
        v(static_cast<const T*>(args.v) + args.cu_k[i] * args.v_stride + head * args.head_dim),
        queries(args.cu_q[i + 1] - args.cu_q[i]),
        keys(args.cu_k[i + 1] - args.cu_k[i]),
        moment(std::max(queries, keys) / moments + 1) {}

  static void ask(const T* row, int64_t dim) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(row + dim);
    for (uintptr_t line = reinterpret_cast<uintptr_t>(row) / 64 * 64; line < end; line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
  void step(const VarlenArgs& args) {
    for (const int64_t end = row + moment; row < end; ++row) {
      if (row < keys) {
        ask(k + row * args.k_stride, args.head_dim);
        ask(v + row * args.v_stride, args.head_dim);
      }
      if (row < queries) ask(q + row * args.q_stride, args.head_dim);
    }
  }

  const T *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t queries = 0, keys = 0, moment = 0, row = 0;
};

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Lane m of the result is all lanes of v[m] joined, in an order that does not depend on M.
template <int M, class F>
inline f32x16 fold_rows(const f32x16 (&v)[M], F&& join) {
#if defined(__AVX512F__)
  f32x16 r[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) r[m] = m < M ? v[m] : f32x16{};
#pragma GCC unroll 4
  for (int rows = 8; rows > 0; rows /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
      r[i] = join(__builtin_shuffle(r[i], r[i + rows], kLowZip),
                  __builtin_shuffle(r[i], r[i + rows], kHighZip));
  }
  return r[0];
#else
  f32x16 r{};
  for (int m = 0; m < M; ++m) r[m] = fold(v[m], join);
  return r;
#endif
}

// Rows `row` .. `row` + M of q against all keys of their sequence.
template <class T, int M>
void attend(const VarlenArgs& args, int64_t row, int64_t head, const Work<T>& work,
            Ahead<T>& ahead) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t count = work.keys_count, dim = work.dim, words = work.steps * d;
  const T* q = static_cast<const T*>(args.q) + row * args.q_stride + head * dim;
  for (int m = 0; m < M; ++m) copy_row(q + m * args.q_stride, dim, words, work.query + m * words);

  const float scale = args.scale * float(kLog2E);
  f32x16 top[M];
  for (int m = 0; m < M; ++m) top[m] = splat(-INFINITY);
  for (int64_t key = 0; key < count; key += kColumns) {
    ahead.step(args);
    const T* panel = work.keys + key * words;
    float* out = work.scores + key;
    const f32x16 bias0 = load(work.bias + key), bias1 = load(work.bias + key + 16);
    if (count - key > 16) {
      tile_rows<2, M>(work.query, words, panel, work.steps, [&](int m, f32x16 lo, f32x16 hi) {
        lo = lo * scale + bias0, hi = hi * scale + bias1;
        store(out + m * work.stride, lo);
        store(out + m * work.stride + 16, hi);
        top[m] = larger(top[m], larger(lo, hi));
      });
    } else {
      tile_rows<1, M>(work.query, words, panel, work.steps, [&](int m, f32x16 lo, f32x16) {
        lo = lo * scale + bias0;
        store(out + m * work.stride, lo);
        top[m] = larger(top[m], lo);
      });
    }
  }

  float part[16];
  const f32x16 peaks = fold_rows(top, larger);
  f32x16 total[M];
  for (int m = 0; m < M; ++m)
    total[m] =
        weigh<T>(work.scores + m * work.stride, count, __builtin_shuffle(peaks, i32x16{} + m));
  store(part, 1.0f / fold_rows(total, [](f32x16 a, f32x16 b) { return a + b; }));

  const T* weights = reinterpret_cast<const T*>(work.scores);
  const int64_t apart = work.stride * int64_t(sizeof(float) / sizeof(T));
  const int64_t steps = (count + d - 1) / d, row_size = args.heads * dim;
  T* out = static_cast<T*>(args.out) + row * row_size + head * dim;
  for (int64_t column = 0; column < dim; column += kColumns, out += kColumns) {
    const T* panel = work.values + column * steps * d;
    const int64_t left = dim - column;
    if (left >= kColumns) {
      tile_rows<2, M>(weights, apart, panel, steps, [&](int m, f32x16 lo, f32x16 hi) {
        store(out + m * row_size, lo * part[m]);
        store(out + m * row_size + 16, hi * part[m]);
      });
    } else {
      const auto done = [&](int m, f32x16 lo, f32x16 hi) {
        store_part(out + m * row_size, lo * part[m], std::min<int64_t>(left, 16));
        if (left > 16) store_part(out + m * row_size + 16, hi * part[m], left - 16);
      };
      left > 16 ? tile_rows<2, M>(weights, apart, panel, steps, done)
                : tile_rows<1, M>(weights, apart, panel, steps, done);
    }
  }
}

// An estimate of the time of one head of a sequence.
inline float cost(const VarlenArgs& args, int64_t i) {
  const float queries = float(args.cu_q[i + 1] - args.cu_q[i]);
  return queries == 0 ? 0 : (queries + kPackRows) * float(args.cu_k[i + 1] - args.cu_k[i]);
}

// Into how many pieces to cut the queries of a head: each packs the keys and values again.
int64_t pieces_of(const VarlenArgs& args, int threads) {
  float total = 0, longest = 0, queries = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    total += float(args.heads) * cost(args, i);
    longest = std::max(longest, cost(args, i));
    queries = std::max(queries, float(args.cu_q[i + 1] - args.cu_q[i]));
  }
  const float heads = longest > 0 ? total / longest : 0;  // as if all were of the longest
  int64_t best = 1;
  float least = INFINITY;
  for (int64_t pieces = 1; pieces <= 2 * threads; ++pieces) {
    const float piece = 1.0f / float(pieces) + kPackRows / (queries + kPackRows);
    const float time = std::ceil(heads * float(pieces) / float(threads) - 1e-3f) * piece;
    if (time < least) least = time, best = pieces;
  }
  return best;
}

template <class T>
void run(const VarlenArgs& args) {
  float products = 0;
  for (int64_t i = 0; i < args.count; ++i) products += 2 * cost(args, i);
  products *= float(args.heads * args.head_dim);
  const int threads =
      int(std::clamp<float>(products / kThreadProducts, 1.0f, float(omp_get_max_threads())));
  const int64_t pieces = threads == 1 ? 1 : pieces_of(args, threads);

  // Longest first, so that threads end together.
  static thread_local Scratch list;
  int32_t* order = list.take<int32_t>(args.count);
  for (int64_t i = 0; i < args.count; ++i) order[i] = int32_t(i);
  std::sort(order, order + args.count, [&](int32_t a, int32_t b) {
    const float left = cost(args, a), right = cost(args, b);
    return left != right ? left > right : a < b;
  });

  const int64_t total = args.count * args.heads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    int64_t last = -1;  // the head of a sequence that is packed
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < total * pieces; ++item) {
      const int64_t piece = item % pieces, which = item / pieces, head = which % args.heads;
      const int64_t i = order[which / args.heads];
      const int64_t first = args.cu_q[i], rows = args.cu_q[i + 1] - first;
      const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
      const int64_t from = tiles * piece / pieces, to = tiles * (piece + 1) / pieces;
      const int64_t keys = args.cu_k[i + 1] - args.cu_k[i];
      if (from == to) continue;
      if (keys == 0) {
        for (int64_t r = rows * from / tiles; r < rows * to / tiles; ++r)
          std::fill_n(static_cast<T*>(args.out) + ((first + r) * args.heads + head) * args.head_dim,
                      args.head_dim, T(0));
        continue;
      }
      const Work<T> work(keys, args.head_dim, scratch);
      if (which != last) pack(args, args.cu_k[i], head, work);
      last = which;
      // What this thread is likely to be given next.
      const int64_t next = (item + threads) / pieces;
      const int64_t j = next > which && next < total ? order[next / args.heads] : -1;
      Ahead<T> ahead;
      if (j >= 0) ahead = Ahead<T>(args, j, next % args.heads, (to - from) * ((keys + 31) / 32));
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t row = rows * tile / tiles;
        with_rows(int(rows * (tile + 1) / tiles - row),
                  [&]<int M>() { attend<T, M>(args, first + row, head, work, ahead); });
      }
    }
  }
}

}  // namespace

void attention_varlen(const VarlenArgs& args) {
  if (args.count == 0 || args.head_dim == 0) return;
  args.dtype == DType::kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace pyrt::PYRT_ISA
