// Causal attention of ragged query rows over a paged cache, online softmax in float32.
//
// The cache keeps keys and values in the panels of the matmul, so scores and the weighted sum are
// the same register tile as every other matmul here. Tile rows are (token, head) pairs that share
// one KV head: grouped-query heads read the cache once. torch's SDPA cannot take kept rows at their
// own positions without a dense mask, and its result depends on how many rows share the call.
//
// Blocks are visited in order and a masked score weighs exactly 0, so a row's result is the same
// bits whatever rows share its tile and however its prompt was cut into chunks. A row that a block
// holds nothing for leaves it unchanged: the block lies in its future, or before its window (then
// its sum is still +0, which the +-0 of a foreign value does not change).
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

inline int64_t source(const AttentionArgs& args, int64_t r) { return args.rows ? args.rows[r] : r; }

template <class T>
struct Work {
  T* query;    // [steps of D][M]
  T* weights;  // [steps of 32 tokens][M]
  float* out;  // [M][padded D]
};

// Rows flat .. flat + M of the (token, head) pairs that start at packed row `first`.
template <class T, int M>
void attend(const AttentionArgs& args, int64_t first, int64_t flat, int64_t kv_head,
            const Work<T>& work) {
  constexpr int64_t d = Step<T>::kDepth;
  const int64_t dim = args.head_dim, padded = (dim + kHeadPad - 1) / kHeadPad * kHeadPad;
  const int64_t group = args.heads / args.kv_heads;
  const int64_t head_size = padded * kBlock;  // elements of one head's block

  const T* rows[M];
  int64_t place[M];            // where row m lies in q and in out
  int32_t oldest[M], last[M];  // the row sees the cache entries oldest .. last
  for (int m = 0; m < M; ++m) {
    const int64_t r = first + (flat + m) / group;
    place[m] = (r * args.heads + kv_head * group + (flat + m) % group) * dim;
    rows[m] = static_cast<const T*>(args.q) + place[m];
    last[m] = args.positions[source(args, r)];
    oldest[m] = args.window > 0 ? int32_t(std::max<int64_t>(last[m] + 1 - args.window, 0)) : 0;
  }
  pack_rows(rows, M, dim, work.query);
  const int32_t newest = last[M - 1];
  const int32_t* table = args.block_tables + args.sequences[source(args, first)] * args.max_blocks;

  float top[M], total[M];
  for (int m = 0; m < M; ++m) {
    // A sink is a score like others, the first one, with a value of zero.
    top[m] = args.sinks ? args.sinks[kv_head * group + (flat + m) % group] : -INFINITY;
    total[m] = args.sinks ? 1.0f : 0.0f;
  }
  std::fill(work.out, work.out + M * padded, 0.0f);

  for (int32_t b = oldest[0] / kBlock, begin = b * kBlock; begin <= newest; begin += kBlock, ++b) {
    const int64_t at = (table[b] * args.kv_heads + kv_head) * head_size;
    const T* keys = static_cast<const T*>(args.keys) + at;
    const T* values = static_cast<const T*>(args.values) + at;
    const int64_t present = std::min<int64_t>(newest + 1 - begin, kBlock);

    f32x16 score[M][2] = {};
    tile<T, M>(work.query, keys, (dim + d - 1) / d, score);
    for (int m = 0; m < M; ++m) {
      const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const int32_t from = oldest[m] - begin, seen = last[m] - begin;
      const bool empty = seen < 0 || from >= kBlock;  // no entry of the block is the row's
      f32x16 lo = score[m][0] * args.scale, hi = score[m][1] * args.scale;
      if (seen < kBlock - 1) {
        lo = lane <= seen ? lo : splat(-INFINITY);
        hi = lane + 16 <= seen ? hi : splat(-INFINITY);
      }
      if (from > 0) {
        lo = lane >= from ? lo : splat(-INFINITY);
        hi = lane + 16 >= from ? hi : splat(-INFINITY);
      }
      f32x16 p0{}, p1{};
      if (!empty) {
        const float peak = std::max(top[m], max(lo > hi ? lo : hi));
        if (peak > top[m]) {
          const float shrink = exp(splat(top[m] - peak))[0];
          total[m] *= shrink;
          float* out = work.out + m * padded;
          for (int64_t i = 0; i < padded; i += 16) store(out + i, load(out + i) * shrink);
          top[m] = peak;
        }
        p0 = exp(lo - peak), p1 = exp(hi - peak);
        total[m] += sum(p0 + p1);
      }
      T lanes[kBlock];
      store(lanes, p0);
      store(lanes + 16, p1);
      for (int64_t t = 0; t < kBlock / d; ++t)
        std::memcpy(work.weights + (t * M + m) * d, lanes + t * d, d * sizeof(T));
    }
    for (int64_t i = 0; i < padded; i += 32) {
      f32x16 acc[M][2];
      for (int m = 0; m < M; ++m) {
        acc[m][0] = load(work.out + m * padded + i);
        acc[m][1] = load(work.out + m * padded + i + 16);
      }
      tile<T, M>(work.weights, values + i * kBlock, (present + d - 1) / d, acc);
      for (int m = 0; m < M; ++m) {
        store(work.out + m * padded + i, acc[m][0]);
        store(work.out + m * padded + i + 16, acc[m][1]);
      }
    }
  }

  for (int m = 0; m < M; ++m) {
    T* out = static_cast<T*>(args.out) + place[m];
    const float* from = work.out + m * padded;
    const float scale = 1.0f / total[m];
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) store(out + i, load(from + i) * scale);
    store_part(out + i, load_part(from + i, dim - i) * scale, dim - i);
  }
}

// One item: a few neighbouring rows for one KV head, cut where the sequence changes; or, where many
// query heads share a KV head (latent attention), some of the heads of one row.
template <class T>
void run(const AttentionArgs& args) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t padded = (args.head_dim + kHeadPad - 1) / kHeadPad * kHeadPad;
  constexpr int64_t kPairs = 4 * kTileRows;
  const int64_t chunk = std::max<int64_t>(kPairs / group, 1);
  const int64_t chunks = (args.kept + chunk - 1) / chunk;
  const int64_t parts = chunk > 1 ? 1 : (group + kPairs - 1) / kPairs;
#pragma omp parallel if (args.kept > 1 || args.positions[source(args, 0)] >= 2 * kBlock)
  {
    static thread_local Scratch scratch;
    float* memory = scratch.take<float>(kTileRows * (2 * padded + kBlock));
    Work<T> work;
    work.out = memory;
    work.query = reinterpret_cast<T*>(memory + kTileRows * padded);
    work.weights = reinterpret_cast<T*>(memory + kTileRows * 2 * padded);
#pragma omp for schedule(dynamic, 1) collapse(3)
    for (int64_t c = chunks - 1; c >= 0; --c) {  // late positions see most: start with them
      for (int64_t head = 0; head < args.kv_heads; ++head) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t stop = std::min(args.kept, (c + 1) * chunk);
          for (int64_t r = c * chunk, end; r < stop; r = end) {
            const int32_t sequence = args.sequences[source(args, r)];
            for (end = r + 1; end < stop && args.sequences[source(args, end)] == sequence;) ++end;
            const int64_t pairs = (end - r) * group * (part + 1) / parts;
            for (int64_t flat = (end - r) * group * part / parts; flat < pairs; flat += kTileRows)
              with_rows(int(std::min<int64_t>(pairs - flat, kTileRows)),
                        [&]<int M>() { attend<T, M>(args, r, flat, head, work); });
          }
        }
      }
    }
  }
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.kept == 0) return;
  args.dtype == DType::kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace pyrt::PYRT_ISA
