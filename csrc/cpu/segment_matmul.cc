// out[r] = epilogue(x[r] @ W[segment of r]^T + bias), or += that: every dense and grouped matmul of
// the runtime.
//
// Weights stream through the cache once per block of rows: a few rows run at memory bandwidth, many
// at the arithmetic peak, by the same inner loop. Work is cut into (segment, row block, panels)
// items that threads take as they become free, so skewed segments do not leave a thread idle.
#include <omp.h>

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kBlockRows = 240;         // rows that share one pass over a panel
constexpr int64_t kBlockBytes = 768 << 10;  // their packed size: with a panel it stays in L2 or L3
constexpr int64_t kColumns = 32;
constexpr int64_t kTailItems = 8;  // a thread, of the blocks that are cut

struct Item {
  int64_t segment, row, rows, panel, panels;
};

// The n-th item of a call, by arithmetic instead of a list: no allocation on the hot path.
class Work {
 public:
  Work(const MatmulArgs& args, int threads) : args_(args) {
    panels_ = (args.out_features + kColumns - 1) / kColumns;
    const int64_t fit = kBlockBytes / (args.in_features * size_of(args.dtype) + 1);
    block_ = std::clamp<int64_t>(fit / kTileRows * kTileRows, kTileRows,
                                 kBlockRows / kTileRows * kTileRows);
    int64_t blocks = 0;
    for (int64_t s = 0; s < segments(); ++s) blocks += blocks_of(rows_of(s));
    // Whole blocks first; the last ones are cut by panels so that threads end together.
    const int64_t tail = std::min<int64_t>(blocks, 2 * threads);
    whole_ = blocks - tail;
    const int64_t wanted = (kTailItems * threads + tail - 1) / std::max<int64_t>(tail, 1);
    pieces_ = threads == 1 ? 1 : std::clamp<int64_t>(wanted, 1, panels_);
    count_ = whole_ + tail * pieces_;
  }

  int64_t count() const { return count_; }

  // Items come in rising order on every thread, so the walk over segments only moves forward.
  Item at(int64_t index) {
    const int64_t block = index < whole_ ? index : whole_ + (index - whole_) / pieces_;
    while (block >= first_ + blocks_of(rows_of(segment_))) first_ += blocks_of(rows_of(segment_++));
    const int64_t rows = rows_of(segment_), blocks = blocks_of(rows), i = block - first_;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t from = tiles * i / blocks * kTileRows;
    const int64_t to = std::min(rows, tiles * (i + 1) / blocks * kTileRows);
    Item item{segment_, start_of(segment_) + from, to - from, 0, panels_};
    if (index >= whole_) {
      const int64_t piece = (index - whole_) % pieces_;
      item.panel = panels_ * piece / pieces_;
      item.panels = panels_ * (piece + 1) / pieces_ - item.panel;
    }
    return item;
  }

  int64_t panels() const { return panels_; }

 private:
  int64_t segments() const { return args_.plan.offsets ? args_.plan.segments : 1; }
  int64_t start_of(int64_t s) const { return args_.plan.offsets ? args_.plan.offsets[s] : 0; }
  int64_t rows_of(int64_t s) const {
    const int32_t* o = args_.plan.offsets;
    return o ? o[s + 1] - o[s] : args_.plan.kept;
  }
  int64_t blocks_of(int64_t rows) const { return (rows + block_ - 1) / block_; }

  const MatmulArgs& args_;
  int64_t panels_, block_, whole_, pieces_, count_;
  int64_t segment_ = 0, first_ = 0;
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

template <class T, class W, class Out>
void run_item(const MatmulArgs& args, const Item& item, const T* packed, int64_t panels,
              Scratch& wide) {
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
      Out* out = static_cast<Out*>(args.out) + (item.row + row) * columns + column;
      for (int m = 0; m < count; ++m)  // it arrives while the products are summed
        for (int i = 0; i < kColumns; i += 64 / sizeof(Out))
          __builtin_prefetch(out + m * columns + i, 1);
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
      for (int m = 0; m < count; ++m, out += columns) {
        f32x16 lo = sums[m][0], hi = sums[m][1];
        if constexpr (kInt8) {
          restore_columns(lo, hi);
          lo = lo * scale_lo, hi = hi * scale_hi;
        }
        write_row(args, out, columns - column, lo + bias_lo, hi + bias_hi);
      }
    }
  }
}

template <class T, class W>
void pack_item(const MatmulArgs& args, const Item& item, T* packed) {
  const int64_t words = Depth<W>(args).words;
  const T* x = static_cast<const T*>(args.x);
  for (int64_t row = 0; row < item.rows; row += kTileRows) {
    const int count = int(std::min<int64_t>(kTileRows, item.rows - row));
    const T* rows[kTileRows];
    for (int m = 0; m < count; ++m) {
      const int64_t r = item.row + row + m;
      rows[m] = x + (args.plan.rows ? args.plan.rows[r] : r) * args.in_features;
    }
    pack_rows(rows, count, args.in_features, packed + row * words);
    if (sizeof(T) == 4 && words > args.in_features)  // pack_rows completes pairs of bf16 only
      std::fill_n(packed + row * words + count * args.in_features, count, T(0));
  }
}

template <class T, class W, class Out>
void run(const MatmulArgs& args) {
  const int threads = omp_get_max_threads();
  const int64_t count = Work(args, threads).count();
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    static thread_local Scratch scratch, wide;
    Work work(args, threads);
    int64_t last_segment = -1, last_row = -1;
    T* packed = nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const Item item = work.at(i);
      if (item.segment != last_segment || item.row != last_row) {
        packed = scratch.take<T>(item.rows * (args.in_features + 1));
        pack_item<T, W>(args, item, packed);
        last_segment = item.segment, last_row = item.row;
      }
      run_item<T, W, Out>(args, item, packed, work.panels(), wide);
    }
  }
}

template <class T, class W>
void run(const MatmulArgs& args) {
  args.out_dtype == DType::kBFloat16 ? run<T, W, bf16>(args) : run<T, W, float>(args);
}

}  // namespace

void segment_matmul(const MatmulArgs& args) {
  if (args.plan.kept == 0 || args.out_features == 0) return;
  const bool narrow = args.dtype == DType::kBFloat16;
  if (args.weight_dtype == DType::kInt8)
    narrow ? run<bf16, int8_t>(args) : run<float, int8_t>(args);
  else
    narrow ? run<bf16, bf16>(args) : run<float, float>(args);
}

}  // namespace pyrt::PYRT_ISA
