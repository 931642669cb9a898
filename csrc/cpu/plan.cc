// Planners. Scalar on purpose: a few comparisons a row, and the same bits as the reference demand
// that no instruction set reorders or fuses anything (this file is built with contraction off). The
// choice of plan_topk, which is more, is topk.cc.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "ops.h"

namespace pyrt {

constexpr int64_t kParallelChoices = 32 << 10;  // below, a second thread costs more than it sorts

int64_t plan_threshold(const float* scores, const float* tau, int64_t tau_stride, int64_t n,
                       int32_t* rows, int32_t* offsets, int32_t* inverse, float* weights) {
  int32_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool keep = !(scores[i] <= tau[i * tau_stride]);
    rows[kept] = int32_t(i);
    if (weights) weights[kept] = scores[i];
    inverse[i] = keep ? kept : -1;
    kept += keep;
  }
  offsets[0] = 0;
  offsets[1] = kept;
  return kept;
}

int64_t plan_partition(const int32_t* labels, const float* slot_weights, int64_t n, int64_t choices,
                       int64_t segments, int32_t* rows, int32_t* offsets, float* weights,
                       int32_t* inverse) {
  // Part t of the choices counts its segments; a scan over (segment, part) turns the counts into
  // where it writes. The parts keep their order, so that their number changes nothing.
  const int64_t total = n * choices;
  const int64_t parts = total < kParallelChoices ? 1 : omp_get_max_threads();
  std::vector<int32_t> cursors(parts * segments, 0);
  int64_t wrong = total;
#pragma omp parallel for schedule(static) reduction(min : wrong) if (parts > 1)
  for (int64_t t = 0; t < parts; ++t) {
    int32_t* counts = cursors.data() + t * segments;
    const int64_t end = total * (t + 1) / parts;
    for (int64_t f = total * t / parts; f < end; ++f) {
      if (labels[f] < -1 || labels[f] >= segments) {
        wrong = std::min(wrong, f);
        break;
      }
      if (labels[f] >= 0) ++counts[labels[f]];
    }
  }
  if (wrong < total) return -1 - wrong;
  int32_t kept = 0;
  for (int64_t s = 0; s < segments; ++s) {
    offsets[s] = kept;
    for (int64_t t = 0; t < parts; ++t) {
      const int32_t count = cursors[t * segments + s];
      cursors[t * segments + s] = kept;
      kept += count;
    }
  }
  offsets[segments] = kept;
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t t = 0; t < parts; ++t) {
    int32_t* cursor = cursors.data() + t * segments;
    const int64_t end = total * (t + 1) / parts;
    int64_t f = total * t / parts;
    for (int64_t row = choices ? f / choices : 0, stop = 0; f < end; ++row) {
      for (stop = std::min(end, (row + 1) * choices); f < stop; ++f) {
        const int32_t position = labels[f] < 0 ? -1 : cursor[labels[f]]++;
        inverse[f] = position;
        if (position < 0) continue;
        rows[position] = int32_t(row);
        if (weights) weights[position] = slot_weights[f];
      }
    }
  }
  return kept;
}

int64_t plan_topk(const TopKArgs& args, int32_t* rows, int32_t* offsets, float* weights) {
  const int64_t slots = args.rows * args.rule.k;
  const auto slot_weights = std::make_unique_for_overwrite<float[]>(slots);
  TopKArgs chosen = args;
  chosen.weights = slot_weights.get();
  kernels().choose_topk(chosen);
  return plan_partition(args.ids, slot_weights.get(), args.rows, args.rule.k, args.experts, rows,
                        offsets, weights, args.ids);
}

float quantile(const float* scores, int64_t n, double q, float* scratch) {
  std::copy(scores, scores + n, scratch);
  const double rank = q * double(n - 1);
  const int64_t below = int64_t(rank);
  // NaN last, as torch sorts: a plain < is no order when there are NaNs.
  const auto less = [](float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); };
  std::nth_element(scratch, scratch + below, scratch + n, less);
  const float low = scratch[below];
  const float part = float(rank - double(below));
  if (part == 0.0f) return low;
  const float high = *std::min_element(scratch + below + 1, scratch + n, less);
  const float step = (high - low) * part;
  return low + step;
}

}  // namespace pyrt
