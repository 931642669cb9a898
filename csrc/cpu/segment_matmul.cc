// out[r] = epilogue(x[r] @ W[segment of r]^T + bias), or += that: every dense and grouped matmul of
// the runtime (cpu/matmul.h). Skewed segments do not leave a thread idle: see Work.
#include "cpu/matmul.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kTailItems = 8;  // a thread, of the blocks that are cut

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

// Rows of x, all or those that the plan names, to rows of out.
struct Dense {
  const MatmulArgs& args;

  template <class W, class T>
  void pack(const Item& item, T* packed) const {
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

  template <class Out>
  Out* out(int64_t r) const {
    return static_cast<Out*>(args.out) + r * args.columns();
  }

  void add(int64_t, int64_t, int64_t, f32x16&, f32x16&) const {}
};

template <class T, class W>
void run(const MatmulArgs& args) {
  const Dense rows{args};
  args.out_dtype == DType::kBFloat16 ? run_items<Work, T, W, bf16>(args, rows)
                                     : run_items<Work, T, W, float>(args, rows);
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
