// out[n] += sum over choices k of weight * packed[inverse[n, k]], float32 accumulate, choices in
// order. Limit: read packed, read and write the touched rows of out. No atomics: rows are owned.
#include <omp.h>

#include "cpu/simd.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

// `next` is the row of out that follows n: scattered rows defeat the hardware prefetcher.
template <class T>
void add_choices(const CombineArgs& args, int64_t n, int64_t next, const int32_t* positions,
                 int64_t choices) {
  const T* packed = static_cast<const T*>(args.packed);
  T* out = static_cast<T*>(args.out) + n * args.width;
  const float* channel = args.channel_weights ? args.channel_weights + n * args.width : nullptr;
  const T* ahead = static_cast<const T*>(args.out) + next * args.width;
  int64_t h = 0;
  for (; h + 16 <= args.width; h += 16) {
    __builtin_prefetch(ahead + h, 1);
    f32x16 total = load(out + h);
    for (int64_t k = 0; k < choices; ++k) {
      if (positions[k] < 0) continue;
      f32x16 value = load(packed + positions[k] * args.width + h);
      if (args.plan.weights) value = value * args.plan.weights[positions[k]];
      if (channel) value = value * load(channel + h);
      total = total + value;
    }
    store(out + h, total);
  }
  for (; h < args.width; ++h) {
    float total = to_float(out[h]);
    for (int64_t k = 0; k < choices; ++k) {
      if (positions[k] < 0) continue;
      float value = to_float(packed[positions[k] * args.width + h]);
      if (args.plan.weights) value = value * args.plan.weights[positions[k]];
      if (channel) value = value * channel[h];
      total = total + value;
    }
    from_float(total, out + h);
  }
}

template <class T>
void run(const CombineArgs& args) {
  const PlanView& plan = args.plan;
  const bool parallel = plan.kept * args.width >= 64 << 10;
  if (plan.choices == 1) {
    // Only kept rows change, and each once: walk them instead of all N.
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t r = 0; r < plan.kept; ++r) {
      const int32_t position = int32_t(r);
      const int64_t after = r + 1 < plan.kept ? r + 1 : r;
      add_choices<T>(args, plan.rows ? plan.rows[r] : r, plan.rows ? plan.rows[after] : after,
                     &position, 1);
    }
    return;
  }
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t n = 0; n < plan.num_rows; ++n)
    add_choices<T>(args, n, n, plan.inverse + n * plan.choices, plan.choices);
}

}  // namespace

void combine(const CombineArgs& args) {
  args.dtype == DType::kBFloat16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace pyrt::PYRT_ISA
