// gather_patches: squares of images, each shrunk to a patch that is a row.
#include "cpu/squares.h"

namespace pyrt::PYRT_ISA {
namespace {

template <class Out>
void run(const GatherPatchArgs& args) {
  const SquaresView& squares = args.squares;
  with_patcher<float, Out>(
      squares.channels, squares.size, squares.bilinear, [&](const auto& patches) {
        write_patches<float>(patches, squares.rows, static_cast<Out*>(args.out),
                             [&](int64_t row) { return square_of(squares, row); });
      });
}

}  // namespace

void gather_patches(const GatherPatchArgs& args) {
  args.out_dtype == DType::kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace pyrt::PYRT_ISA
