// Squares of images, shrunk to patches: the rows of a convolution, and of a mixed-scale ViT.
// Limit: one read of the pixels and one write of the rows.
#pragma once

#include <omp.h>

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

// The square of side ratio * size at (top, left) of an image [C, H, W]; it may lie outside.
template <class In>
struct Square {
  const In* image;
  int64_t height, width, top, left, ratio;

  const In* line(int64_t channel, int64_t y) const {  // where it is inside
    return image + (channel * height + top + y) * width + left;
  }
  bool inside(int64_t side) const {
    return top >= 0 && left >= 0 && top + side <= height && left + side <= width;
  }
};

inline Square<float> square_of(const SquaresView& view, int64_t row) {
  const int32_t* place = view.places + 4 * row;
  const int64_t* image = view.table + 3 * place[0];
  return {view.pixels + image[0], image[1], image[2], place[1], place[2], place[3]};
}

// The pixels of every block that a mean reads: lines and columns first .. end of its ratio ones.
struct Taps {
  int64_t first, end;
  float share;  // of one of them in the mean

  Taps(int64_t ratio, bool bilinear)
      : first(bilinear ? (ratio - 1) / 2 : 0),
        end(bilinear ? ratio / 2 + 1 : ratio),
        share(1.0f / float((end - first) * (end - first))) {}
};

constexpr i32x16 kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr i32x16 kOdd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// to[d] = every R-th of `count` floats, from the d-th on.
template <int R>
[[gnu::always_inline]] inline void comb(const float* from, int64_t count, f32x16 (&to)[R]) {
  if constexpr (R == 1) {
    to[0] = count >= 16 ? load(from) : count > 0 ? load_part(from, count) : f32x16{};
  } else {
    f32x16 lower[R / 2], upper[R / 2];
    comb<R / 2>(from, count, lower);
    comb<R / 2>(from + 8 * R, count - 8 * R, upper);
#pragma GCC unroll 8
    for (int d = 0; d < R / 2; ++d) {
      to[d] = __builtin_shuffle(lower[d], upper[d], kEven);
      to[d + R / 2] = __builtin_shuffle(lower[d], upper[d], kOdd);
    }
  }
}

// Adds the pixels of one line to the sums of `size` blocks of R x R, from left to right. The first
// line of a block starts them, from its first pixel and not from 0.
template <int R>
[[gnu::always_inline]] inline void add_line(const float* line, int64_t size, bool first,
                                            float* sums) {
  for (int64_t x = 0; x < size; x += 16, line += 16 * R, sums += 16) {
    f32x16 pixels[R];
    comb<R>(line, std::min<int64_t>(size - x, 16) * R, pixels);
    f32x16 total = first ? pixels[0] : load(sums) + pixels[0];
#pragma GCC unroll 8
    for (int d = 1; d < R; ++d) total += pixels[d];
    store(sums, total);
  }
}

inline void add_line(const float* line, int64_t size, int64_t ratio, const Taps& taps, bool first,
                     float* sums) {
  for (int64_t x = 0; x < size; ++x, line += ratio) {
    float total = first ? line[taps.first] : sums[x] + line[taps.first];
    for (int64_t d = taps.first + 1; d < taps.end; ++d) total += line[d];
    sums[x] = total;
  }
}

// Through the caches, or beside them, where a result that exceeds them goes at the speed of a copy.
// Beside them whole lines must come at once, aligned.
template <bool kBeside, class Out>
[[gnu::always_inline]] inline void put(Out* to, f32x16 value, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (kBeside && sizeof(Out) == 4)
    return _mm512_stream_ps(to, (__m512)value);
  else if constexpr (kBeside)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)narrow(value));
#endif
  if (count >= 16)
    store(to, value);
  else if (count > 0)
    store_part(to, value, count);
}

template <bool kBeside = false, class In, class Out>
[[gnu::always_inline]] inline void copy(const In* from, int64_t count, Out* to) {
  for (; count >= 16; count -= 16, from += 16, to += 16) put<kBeside>(to, load(from), 16);
  if (count > 0) put<kBeside>(to, load_part(from, count), count);
}

// Line y of a square that is not all inside, completed by 0 to `side` pixels.
template <class In>
inline void pad_line(const Square<In>& square, int64_t channel, int64_t y, int64_t side, In* to) {
  const int64_t line = square.top + y;
  const int64_t from = std::clamp<int64_t>(-square.left, 0, side);
  const int64_t end = std::clamp<int64_t>(square.width - square.left, from, side);
  if (line < 0 || line >= square.height || from == end) {
    std::fill_n(to, side, In(0));
    return;
  }
  std::fill_n(to, from, In(0));
  copy(square.line(channel, y) + from, end - from, to + from);
  std::fill_n(to + end, side - end, In(0));
}

constexpr int64_t kGroup = 32;             // patches that are built together, at most
constexpr int64_t kStreamBytes = 8 << 20;  // of a result that no cache will hold (measured)

// Neighbours: squares of one ratio side by side, as long as all lie inside of their image, or none.
// Their lines are read in the order of memory, without which DRAM is half as fast (measured).
template <class In>
struct Group {
  Square<In> squares[kGroup];
  int64_t count = 0;
  bool inside = false;

  // From row `from` on, of those that at(row) gives.
  template <class At>
  void take(const At& at, int64_t from, int64_t end, int64_t size) {
    end = std::min(end, from + kGroup);
    for (count = 0; from + count < end; ++count) {
      const Square<In> square = at(from + count);
      const bool whole = square.inside(square.ratio * size);
      if (count == 0)
        inside = whole;
      else if (whole != inside || square.image != squares->image || square.top != squares->top ||
               square.ratio != squares->ratio)
        break;
      squares[count] = square;
    }
  }
};

// Patches of one shape: kSize is the usual one of them, unrolled, or 0.
template <int kSize, class In, class Out>
class Patcher {
 public:
  Patcher(int64_t channels, int64_t size, bool bilinear)
      : channels_(channels), size_(size), bilinear_(bilinear) {}

  int64_t size() const { return kSize ? kSize : size_; }
  int64_t width() const { return channels_ * size() * size(); }

  // Whether rows at `out` can be written beside the caches.
  static bool can_stream(const Out* out) {
    return kStreams && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }

  // Rows from .. end of the squares that at(row) gives, to out [end - from, C, size, size].
  template <bool kBeside, class At>
  void write(const At& at, int64_t from, int64_t end, Out* out) const {
    Group<In> group;
    for (; from < end; from += group.count, out += group.count * width()) {
      group.take(at, from, end, size());
      if (!group.inside)
        lines<kBeside, false, 0>(group, out);
      else if (group.squares->ratio == 1)
        lines<kBeside, true, 1>(group, out);
      else if (group.squares->ratio == 2)
        lines<kBeside, true, 2>(group, out);
      else
        lines<kBeside, true, 0>(group, out);
    }
  }

 private:
#if defined(__AVX512F__)
  static constexpr bool kAvx512 = true;
#else
  static constexpr bool kAvx512 = false;
#endif
  // Lines of a patch in a cache line: beside the caches they go together.
  static constexpr int64_t kLines = kSize * sizeof(Out) == 32 ? 2 : 1;
  static constexpr bool kStreams = kAvx512 && kSize > 0 && kSize % 16 == 0 &&
                                   (kLines == 1 || sizeof(In) == sizeof(float));

  // Pixels are read line by line of the image. The sums of means wait in a buffer meanwhile: lines
  // of a block by turns would not be foreseen by the processor, at half the bandwidth (measured).
  template <bool kBeside, bool kInside, int kRatio>
  void lines(const Group<In>& group, Out* out) const {
    const int64_t size = this->size(), width = this->width();
    const int64_t ratio = kRatio ? kRatio : group.squares->ratio, side = ratio * size;
    const Taps taps(ratio, bilinear_);
    static thread_local Scratch scratch, waiting;
    In* padded = kInside ? nullptr : scratch.take<In>(side);
    const auto line_of = [&](int64_t m, int64_t c, int64_t y)
                             __attribute__((always_inline)) -> const In* {
      if constexpr (kInside) return group.squares[m].line(c, y);
      pad_line(group.squares[m], c, y, side, padded);
      return padded;
    };
    constexpr int64_t together = kBeside && kStreams ? kLines : 1;
    const int64_t columns = (size + 15) / 16 * 16;
    float* sums = waiting.take<float>(kGroup * together * columns);
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t y = 0; y < size; y += together, out += together * size) {
        if (ratio == 1 && together == 1) {
          for (int64_t m = 0; m < group.count; ++m)
            copy<kBeside>(line_of(m, c, y), size, out + m * width);
        } else if constexpr (sizeof(In) == sizeof(float)) {
          for (int64_t i = 0; i < together; ++i)
            for (int64_t d = taps.first; d < taps.end; ++d)
              for (int64_t m = 0; m < group.count; ++m)
                add<kRatio>(line_of(m, c, (y + i) * ratio + d), ratio, taps, d == taps.first,
                            sums + (m * together + i) * columns);
          for (int64_t m = 0; m < group.count; ++m)
            for (int64_t i = 0; i < together; ++i) {
              const float* from = sums + (m * together + i) * columns;
              Out* to = out + m * width + i * size;
              for (int64_t x = 0; x < size; x += 16)
                put<kBeside>(to + x, load(from + x) * taps.share, std::min<int64_t>(size - x, 16));
            }
        }
      }
  }

  template <int kRatio>
  [[gnu::always_inline]] void add(const float* line, int64_t ratio, const Taps& taps, bool first,
                                  float* sums) const {
    if constexpr (kRatio == 1 || kRatio == 2) return add_line<kRatio>(line, size(), first, sums);
    const bool all = taps.end - taps.first == ratio;
    if (all && ratio == 4) return add_line<4>(line, size(), first, sums);
    if (all && ratio == 8) return add_line<8>(line, size(), first, sums);
    add_line(line, size(), ratio, taps, first, sums);
  }

  int64_t channels_, size_;
  bool bilinear_;
};

// Calls f(patcher) for the patcher of that size.
template <class In, class Out, class F>
inline void with_patcher(int64_t channels, int64_t size, bool bilinear, F&& f) {
  switch (size) {
    case 4:
      return f(Patcher<4, In, Out>(channels, size, bilinear));
    case 7:
      return f(Patcher<7, In, Out>(channels, size, bilinear));
    case 14:
      return f(Patcher<14, In, Out>(channels, size, bilinear));
    case 16:
      return f(Patcher<16, In, Out>(channels, size, bilinear));
    case 32:
      return f(Patcher<32, In, Out>(channels, size, bilinear));
    default:
      return f(Patcher<0, In, Out>(channels, size, bilinear));
  }
}

// out [rows, C * size * size] of the squares that at(r) gives.
template <class In, class Out, class Patches, class At>
void write_patches(const Patches& patches, int64_t rows, Out* out, const At& at) {
  const int64_t width = patches.width();
  const bool beside =
      rows * width * int64_t(sizeof(Out)) >= kStreamBytes && patches.can_stream(out);
#pragma omp parallel if (rows * width >= 64 << 10)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t end = rows * (thread + 1) / threads;
    const int64_t from = rows * thread / threads;
    beside ? patches.template write<true>(at, from, end, out + from * width)
           : patches.template write<false>(at, from, end, out + from * width);
#if defined(__AVX512F__)
    if (beside) _mm_sfence();  // before other threads may read it
#endif
  }
}

}  // namespace
}  // namespace pyrt::PYRT_ISA
