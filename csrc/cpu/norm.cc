// rms_norm with the scalar gate's score, layer_norm, and the sigmoid + mean of a vector gate.
// One read and one write of every row: composed from torch ops the same takes about ten passes.
#include <omp.h>

#include <cmath>

#include "cpu/simd.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

// Sum of a term over a row in one fixed order: four sums by turns, as one would wait for itself.
template <class T, class F>
inline float row_sum(const T* x, int64_t whole, int64_t rest, F&& term) {
  f32x16 total[4] = {};
  int64_t h = 0;
  for (; h + 64 <= whole; h += 64)
    for (int i = 0; i < 4; ++i) total[i] += term(load(x + h + 16 * i));
  for (; h < whole; h += 16) total[0] += term(load(x + h));
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (rest) total[1] += lane < int32_t(rest) ? term(load_part(x + whole, rest)) : f32x16{};
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <bool kCentred, class T, class Out>
void norm_row(const NormArgs& args, int64_t n) {
  const int64_t width = args.width, whole = width / 16 * 16, rest = width - whole;
  const T* x = static_cast<const T*>(args.x) + (args.source ? args.source[n] : n) * width;
  Out* out = static_cast<Out*>(args.out) + n * width;
  float mean = 0.0f;  // squares of differences from it, not a difference of squares, which cancels
  if (kCentred) mean = row_sum(x, whole, rest, [](f32x16 v) { return v; }) / float(width);
  const float squares = row_sum(x, whole, rest, [&](f32x16 v) { return (v - mean) * (v - mean); });
  const float scale = 1.0f / std::sqrt(squares / float(width) + args.eps);
  const auto normed = [&](f32x16 v, f32x16 weight) { return (v - mean) * scale * weight; };
  f32x16 dot{};
  for (int64_t h = 0; h < whole; h += 16) {
    f32x16 y = normed(load(x + h), load(args.weight + h));
    if (kCentred) y += load(args.bias + h);
    if (kCentred && args.gelu) y = gelu(y);
    store(out + h, y);
    if (!kCentred && args.probe) dot += load(out + h) * load(args.probe + h);
  }
  if (rest) {
    f32x16 y = normed(load_part(x + whole, rest), load_part(args.weight + whole, rest));
    if (kCentred) y += load_part(args.bias + whole, rest);
    if (kCentred && args.gelu) y = gelu(y);
    store_part(out + whole, y, rest);
    if (!kCentred && args.probe)
      dot += load_part(out + whole, rest) * load_part(args.probe + whole, rest);
  }
  if (!kCentred && args.probe) args.probe_out[n] = sigmoid(splat(sum(dot) + args.probe_bias))[0];
}

template <bool kCentred, class T, class Out>
void norm_rows(const NormArgs& args) {
#pragma omp parallel for schedule(static) if (args.rows * args.width >= 32 << 10)
  for (int64_t n = 0; n < args.rows; ++n) norm_row<kCentred, T, Out>(args, n);
}

}  // namespace

void rms_norm(const NormArgs& args) {
  args.dtype == DType::kBFloat16 ? norm_rows<false, bf16, bf16>(args)
                                 : norm_rows<false, float, float>(args);
}

void layer_norm(const NormArgs& args) {
  const bool narrow = args.out_dtype == DType::kBFloat16;
  if (args.dtype == DType::kBFloat16)
    narrow ? norm_rows<true, bf16, bf16>(args) : norm_rows<true, bf16, float>(args);
  else
    narrow ? norm_rows<true, float, bf16>(args) : norm_rows<true, float, float>(args);
}

void gate(const GateArgs& args) {
  const int64_t width = args.width, whole = width / 16 * 16, rest = width - whole;
#pragma omp parallel for schedule(static) if (args.rows * width >= 16 << 10)
  for (int64_t n = 0; n < args.rows; ++n) {
    float* x = args.x + n * width;
    f32x16 total{};
    for (int64_t h = 0; h < whole; h += 16) {
      const f32x16 g = sigmoid(load(x + h));
      store(x + h, g);
      total += g;
    }
    if (rest) {
      store_part(x + whole, sigmoid(load_part(x + whole, rest)), rest);
      total += load_part(x + whole, rest);
    }
    args.mean[n] = sum(total) / float(width);
  }
}

}  // namespace pyrt::PYRT_ISA
