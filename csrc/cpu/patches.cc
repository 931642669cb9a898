// patches: what a convolution with these kernels reads, one row for every place it stops at, so
// that the convolution is a matmul. Limit: one read of the image and one write of the rows.
#include <omp.h>

#include <algorithm>

#include "cpu/simd.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kAhead = 2;  // patches that are fetched before they are copied (measured)

template <class In, class Out>
inline void copy(const In* from, int64_t count, Out* to) {
  for (; count >= 16; count -= 16, from += 16, to += 16) store(to, load(from));
  if (count > 0) store_part(to, load_part(from, count), count);
}

// Where patch row or column i lies in the image: the part from..to of it, that begins at `first`.
struct Span {
  int64_t first, from, to;
  Span(int64_t i, const PatchArgs& args, int64_t limit)
      : first(i * args.stride - args.padding),
        from(std::clamp<int64_t>(-first, 0, args.size)),
        to(std::clamp<int64_t>(limit - first, from, args.size)) {}
};

template <class In, class Out>
inline void copy_part(const In* line, const Span& part, int64_t size, Out* out) {
  std::fill_n(out, part.from, Out(0));
  copy(line + part.from, part.to - part.from, out + part.from);
  std::fill_n(out + part.to, size - part.to, Out(0));
}

// One line of patches of an image [C, H, W], patch by patch: what is written is in order, and what
// the next patch reads, a little of many lines, is fetched early.
template <int kSize, class In, class Out>
void line_of_planes(const PatchArgs& args, const In* image, int64_t i, Out* out) {
  const int64_t size = kSize ? kSize : args.size;
  const Span rows(i, args, args.height);
  for (int64_t j = 0; j < args.across(); ++j) {
    const Span part(j, args, args.width);
    const bool whole = part.from == 0 && part.to == size;
    for (int64_t c = 0; c < args.channels; ++c) {
      out = std::fill_n(out, rows.from * size, Out(0));
      const In* line = image + (c * args.height + rows.first + rows.from) * args.width + part.first;
      for (int64_t y = rows.from; y < rows.to; ++y, line += args.width, out += size) {
        __builtin_prefetch(line + kAhead * args.stride);
        whole ? copy(line, size, out) : copy_part(line, part, size, out);
      }
      out = std::fill_n(out, (size - rows.to) * size, Out(0));
    }
  }
}

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
  const int64_t down = args.down(), pixels = args.channels * args.height * args.width;
  const int64_t line = args.across() * args.channels * args.size * args.size;
#pragma omp parallel for schedule(static) if (args.images * down * line >= 64 << 10)
  for (int64_t item = 0; item < args.images * down; ++item) {
    const In* image = static_cast<const In*>(args.x) + item / down * pixels;
    Out* out = static_cast<Out*>(args.out) + item * line;
    if (args.channels_last)  // the usual sizes of patches, unrolled: twice as fast
      line_of_tokens(args, image, item % down, out);
    else if (args.size == 16)
      line_of_planes<16>(args, image, item % down, out);
    else if (args.size == 14)
      line_of_planes<14>(args, image, item % down, out);
    else if (args.size == 7)
      line_of_planes<7>(args, image, item % down, out);
    else
      line_of_planes<0>(args, image, item % down, out);
  }
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
