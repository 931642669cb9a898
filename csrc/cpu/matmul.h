// What every matmul of the runtime shares: work in items of (segment, row block, panels) that
// threads take as they become free, a block of rows packed side by side, and the tile over the
// panels.
//
// Weights stream through the cache once per block of rows: a few rows run at memory bandwidth, many
// at the arithmetic peak, by the same inner loop.
#pragma once

#include <omp.h>

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kBlockRows = 240;         // rows that share one pass over a panel
constexpr int64_t kBlockBytes = 768 << 10;  // their packed size: with a panel it stays in L2 or L3
constexpr int64_t kColumns = 32;            // of a panel

struct Item {
  int64_t segment, row, rows, panel, panels;
};

template <class Out>
inline void write(const MatmulArgs& args, Out* out, int64_t count, f32x16 value) {
  if (count >= 16)
    store(out, args.accumulate ? load(out) + value : value);
  else
    store_part(out, args.accumulate ? load_part(out, count) + value : value, count);
}

// `left` columns of the row are still to be written, from out on.
template <class Out>
inline void write_row(const MatmulArgs& args, Out* out, int64_t left, f32x16 lo, f32x16 hi) {
  if (args.pair()) {
    const f32x16 value = args.epilogue == Epilogue::kSiluMul
                             ? silu(lo) * hi
                             : swiglu_oai(lo, hi, args.alpha, args.limit);
    return write(args, out, left, value);
  }
  if (args.epilogue == Epilogue::kGelu) lo = gelu(lo), hi = gelu(hi);
  if (args.epilogue == Epilogue::kSilu) lo = silu(lo), hi = silu(hi);
  if (args.epilogue == Epilogue::kRelu) lo = relu(lo), hi = relu(hi);
  write(args, out, left, lo);
  if (left > 16) write(args, out + 16, left - 16, hi);
}

// The 32 columns of panel p of a vector [N]; that of a pair keeps gate columns first, then up.
inline void load_columns(const MatmulArgs& args, const float* vector, int64_t panel, f32x16* lo,
                         f32x16* hi) {
  if (args.pair()) {
    const int64_t half = args.out_features / 2;
    const int64_t left = std::min<int64_t>(half - panel * 16, 16);
    *lo = load_part(vector + panel * 16, left);
    *hi = load_part(vector + half + panel * 16, left);
    return;
  }
  const int64_t left = args.out_features - panel * kColumns;
  *lo = load_part(vector + panel * kColumns, std::min<int64_t>(left, 16));
  *hi = load_part(vector + panel * kColumns + 16, std::clamp<int64_t>(left - 16, 0, 16));
}

// K in steps of the panels of W, and completed to whole ones: so x is packed.
template <class W>
struct Depth {
  static constexpr int64_t kStep = sizeof(W) == 4 ? 1 : 2;
  explicit Depth(const MatmulArgs& args)
      : steps((args.in_features + kStep - 1) / kStep), words(steps * kStep) {}
  int64_t steps, words;
};

// Rows says what is multiplied and where results go:
//   pack<W>(item, packed)           the item's rows side by side
//   out<Out>(r)                     row r of the result
//   add(r, column, left, &lo, &hi)  what is added to its columns before the epilogue
template <class T, class W, class Out, class Rows>
void run_item(const MatmulArgs& args, const Rows& rows, const Item& item, const T* packed,
              int64_t panels, Scratch& wide) {
  constexpr bool kInt8 = sizeof(W) == 1;
  const Depth<W> depth(args);
  const int64_t words = depth.words, columns = args.columns();
  const int64_t vector = item.segment * args.out_features;  // where its bias and scale begin
  const W* weight = static_cast<const W*>(args.weight) + item.segment * panels * words * kColumns;
  T* converted =
      kInt8 && item.rows > kConvertRows<T> ? wide.template take<T>(words * kColumns) : nullptr;
  for (int64_t p = item.panel; p < item.panel + item.panels; ++p) {
    const W* panel = weight + p * words * kColumns;
    f32x16 bias_lo{}, bias_hi{}, scale_lo{}, scale_hi{};
    if (args.bias) load_columns(args, args.bias + vector, p, &bias_lo, &bias_hi);
    if constexpr (kInt8) {
      load_columns(args, args.scale + vector, p, &scale_lo, &scale_hi);
      if (converted) widen_panel(panel, depth.steps, converted);
    }
    const int64_t column = p * (args.pair() ? 16 : 32);
    for (int64_t row = 0; row < item.rows; row += kTileRows) {
      const int count = int(std::min<int64_t>(kTileRows, item.rows - row));
      const T* a = packed + row * words;
      const auto out = [&](int m) { return rows.template out<Out>(item.row + row + m) + column; };
      for (int m = 0; m < count; ++m)  // it arrives while the products are summed
        for (int i = 0; i < kColumns; i += 64 / sizeof(Out)) __builtin_prefetch(out(m) + i, 1);
      f32x16 sums[kTileRows][2];
      with_rows(count, [&]<int M>() {
        f32x16 acc[M][2] = {};
        if constexpr (kInt8) {
          converted ? tile<T, M>(a, converted, words / Step<T>::kDepth, acc)
                    : tile<T, M>(a, panel, depth.steps, acc);
        } else {
          tile<T, M>(a, panel, depth.steps, acc);
        }
        std::memcpy(sums, acc, sizeof(acc));
      });
      for (int m = 0; m < count; ++m) {
        f32x16 lo = sums[m][0], hi = sums[m][1];
        if constexpr (kInt8) {
          restore_columns(lo, hi);
          lo = lo * scale_lo, hi = hi * scale_hi;
        }
        lo += bias_lo, hi += bias_hi;
        rows.add(item.row + row + m, column, columns - column, lo, hi);
        write_row(args, out(m), columns - column, lo, hi);
      }
    }
  }
}

// Cut(args, threads) says what the items are: count() of them, at(i) in rising order, and panels().
template <class Cut, class T, class W, class Out, class Rows>
void run_items(const MatmulArgs& args, const Rows& rows) {
  const int threads = omp_get_max_threads();
  const int64_t count = Cut(args, threads).count();
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    static thread_local Scratch scratch, wide;
    Cut work(args, threads);
    int64_t last_segment = -1, last_row = -1;
    T* packed = nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const Item item = work.at(i);
      if (item.segment != last_segment || item.row != last_row) {
        packed = scratch.take<T>(item.rows * (args.in_features + 1));
        rows.template pack<W>(item, packed);
        last_segment = item.segment, last_row = item.row;
      }
      run_item<T, W, Out>(args, rows, item, packed, work.panels(), wide);
    }
  }
}

}  // namespace
}  // namespace pyrt::PYRT_ISA
