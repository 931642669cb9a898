// out[out_rows[r]] = epilogue(W patch(r) + bias + position): squares of images straight into the
// packed rows of a matmul, so that patches exist only in a cache.
#include "cpu/matmul.h"
#include "cpu/squares.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kFewRows = 2 * kTileRows;  // of an item: then columns are cut too

// Rows are cut first, evenly and not in whole tiles: parts are equal, and no patch is built twice.
class Even {
 public:
  Even(const MatmulArgs& args, int threads)
      : rows_(args.plan.kept), panels_((args.out_features + kColumns - 1) / kColumns) {
    const int64_t fit = kBlockBytes / (args.in_features * size_of(args.dtype) + 1);
    const int64_t block = std::clamp<int64_t>(fit, kTileRows, kBlockRows);
    blocks_ = (rows_ + block - 1) / block;
    if (rows_ >= threads * kFewRows) {
      blocks_ = (blocks_ + threads - 1) / threads * threads;
    } else {
      blocks_ = std::max(blocks_, rows_ / kFewRows);
      pieces_ = std::min(panels_, (threads + blocks_ - 1) / blocks_);
    }
  }

  int64_t count() const { return blocks_ * pieces_; }
  int64_t panels() const { return panels_; }

  Item at(int64_t index) const {
    const int64_t block = index / pieces_, piece = index % pieces_;
    const int64_t row = rows_ * block / blocks_, panel = panels_ * piece / pieces_;
    return {0, row, rows_ * (block + 1) / blocks_ - row, panel,
            panels_ * (piece + 1) / pieces_ - panel};
  }

 private:
  int64_t rows_, panels_, blocks_, pieces_ = 1;
};

struct Tokens {
  const EmbedArgs& args;

  template <class W, class T>
  void pack(const Item& item, T* packed) const {
    const SquaresView& squares = args.squares;
    with_patcher<float, T>(squares.channels, squares.size, squares.bilinear,
                           [&](const auto& patches) { pack(patches, item, packed); });
  }

  template <class Patches, class T>
  void pack(const Patches& patches, const Item& item, T* packed) const {
    static thread_local Scratch scratch;
    const int64_t width = patches.width(), depth = Step<T>::kDepth;
    const int64_t words = (width + depth - 1) / depth * depth;
    T* built = scratch.take<T>(kTileRows * width);
    const auto square_at = [&](int64_t row) { return square_of(args.squares, row); };
    const int64_t end = item.row + item.rows;
    for (int64_t row = item.row; row < end; row += kTileRows, packed += kTileRows * words) {
      const int count = int(std::min<int64_t>(kTileRows, end - row));
      patches.template write<false>(square_at, row, row + count, built);
      const T* rows[kTileRows];
      for (int m = 0; m < count; ++m) rows[m] = built + m * width;
      pack_rows(rows, count, width, packed);
    }
  }

  template <class Out>
  Out* out(int64_t r) const {
    return static_cast<Out*>(args.out) + (args.out_rows ? args.out_rows[r] : r) * args.columns;
  }

  void add(int64_t r, int64_t column, int64_t left, f32x16& lo, f32x16& hi) const {
    if (!args.positions) return;
    const float* position = args.positions + args.position_rows[r] * args.columns + column;
    lo += load_part(position, std::min<int64_t>(left, 16));
    if (left > 16) hi += load_part(position + 16, std::min<int64_t>(left - 16, 16));
  }
};

template <class T, class Out>
void run(const EmbedArgs& args) {
  const SquaresView& squares = args.squares;
  MatmulArgs product{};
  product.weight = args.weight;
  product.bias = args.bias;
  product.plan.kept = squares.rows;
  product.in_features = squares.width();
  product.out_features = args.columns;
  product.dtype = product.weight_dtype = args.weight_dtype;
  product.epilogue = args.epilogue;
  run_items<Even, T, T, Out>(product, Tokens{args});
}

template <class T>
void run(const EmbedArgs& args) {
  args.out_dtype == DType::kBFloat16 ? run<T, bf16>(args) : run<T, float>(args);
}

}  // namespace

void embed_patches(const EmbedArgs& args) {
  if (args.squares.rows == 0 || args.columns == 0) return;
  args.weight_dtype == DType::kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace pyrt::PYRT_ISA
