// patches: what a convolution with these kernels reads, one row for every place it stops at, so
// that the convolution is a matmul. Limit: one read of the image and one write of the rows.
#include "cpu/squares.h"

namespace pyrt::PYRT_ISA {
namespace {

// Where patch row or column i lies in the image: the part from..to of it, that begins at `first`.
struct Span {
  int64_t first, from, to;
  Span(int64_t i, const PatchArgs& args, int64_t limit)
      : first(i * args.stride - args.padding),
        from(std::clamp<int64_t>(-first, 0, args.size)),
        to(std::clamp<int64_t>(limit - first, from, args.size)) {}
};

// One line of patches of a map [H, W, C]: every patch is a transpose of its taps.
template <class In, class Out>
void line_of_tokens(const PatchArgs& args, const In* map, int64_t i, Out* out) {
  const int64_t size = args.size, taps = size * size, channels = args.channels;
  const Span rows(i, args, args.height);
  for (int64_t j = 0; j < args.across(); ++j, out += channels * taps) {
    const Span part(j, args, args.width);
    for (int64_t t = 0; t < taps; t += 16) {
      const int64_t count = std::min<int64_t>(taps - t, 16);
      const In* tap[16];  // null outside of the map
      for (int64_t k = 0; k < count; ++k) {
        const int64_t y = (t + k) / size, x = (t + k) % size;
        const bool inside = y >= rows.from && y < rows.to && x >= part.from && x < part.to;
        tap[k] =
            inside ? map + ((rows.first + y) * args.width + part.first + x) * channels : nullptr;
      }
      int64_t c = 0;
#if defined(__AVX512F__)
      for (; c < channels; c += 16) {
        const int64_t lanes = std::min<int64_t>(channels - c, 16);
        f32x16 block[16] = {};
        for (int64_t k = 0; k < count; ++k)
          if (tap[k]) block[k] = load_part(tap[k] + c, lanes);
        transpose(block);
        for (int64_t l = 0; l < lanes; ++l) store_part(out + (c + l) * taps + t, block[l], count);
      }
#endif
      for (; c < channels; ++c)
        for (int64_t k = 0; k < count; ++k)
          from_float(tap[k] ? to_float(tap[k][c]) : 0.0f, out + c * taps + t + k);
    }
  }
}

template <class In, class Out>
void run(const PatchArgs& args) {
  const int64_t down = args.down(), across = args.across(), channels = args.channels;
  const int64_t pixels = channels * args.height * args.width;
  const In* x = static_cast<const In*>(args.x);
  Out* out = static_cast<Out*>(args.out);
  if (!args.channels_last) {
    const auto square_at = [&](int64_t row) {
      const int64_t line = row / across;
      return Square<In>{x + line / down * pixels,
                        args.height,
                        args.width,
                        line % down * args.stride - args.padding,
                        row % across * args.stride - args.padding,
                        1};
    };
    return with_patcher<In, Out>(channels, args.size, false, [&](const auto& patches) {
      write_patches<In>(patches, args.images * down * across, out, square_at);
    });
  }
  const int64_t line = across * channels * args.size * args.size;
#pragma omp parallel for schedule(static) if (args.images * down * line >= 64 << 10)
  for (int64_t item = 0; item < args.images * down; ++item)
    line_of_tokens(args, x + item / down * pixels, item % down, out + item * line);
}

}  // namespace

void patches(const PatchArgs& args) {
  const bool narrow = args.out_dtype == DType::kBFloat16;
  if (args.dtype == DType::kBFloat16)
    narrow ? run<bf16, bf16>(args) : run<bf16, float>(args);
  else
    narrow ? run<float, bf16>(args) : run<float, float>(args);
}

}  // namespace pyrt::PYRT_ISA
