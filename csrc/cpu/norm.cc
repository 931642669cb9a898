// rms_norm with the scalar gate's score, and the sigmoid + mean of a vector gate.
// One read and one write of every row: composed from torch ops the same takes about ten passes.
#include <omp.h>

#include <cmath>

#include "cpu/simd.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

template <class T>
void norm_row(const NormArgs& args, int64_t n) {
  const int64_t width = args.width, whole = width / 16 * 16, rest = width - whole;
  const T* x = static_cast<const T*>(args.x) + n * width;
  T* out = static_cast<T*>(args.out) + n * width;
  f32x16 squares{};
  for (int64_t h = 0; h < whole; h += 16) {
    const f32x16 v = load(x + h);
    squares += v * v;
  }
  const f32x16 last = load_part(x + whole, rest);
  squares += last * last;
  const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + args.eps);
  f32x16 dot{};
  for (int64_t h = 0; h < whole; h += 16) {
    store(out + h, load(x + h) * scale * load(args.weight + h));
    if (args.probe) dot += load(out + h) * load(args.probe + h);
  }
  store_part(out + whole, last * scale * load_part(args.weight + whole, rest), rest);
  if (args.probe) {
    dot += load_part(out + whole, rest) * load_part(args.probe + whole, rest);
    args.probe_out[n] = sigmoid(splat(sum(dot) + args.probe_bias))[0];
  }
}

}  // namespace

void rms_norm(const NormArgs& args) {
#pragma omp parallel for schedule(static) if (args.rows * args.width >= 32 << 10)
  for (int64_t n = 0; n < args.rows; ++n)
    args.dtype == DType::kBFloat16 ? norm_row<bf16>(args, n) : norm_row<float>(args, n);
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
