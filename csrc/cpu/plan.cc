// Planners. Scalar on purpose: a few comparisons a row, and the same bits as the reference demand
// that no instruction set reorders or fuses anything (this file is built with contraction off).
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace pyrt {

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

// NaN is below every number, and equal to itself.
static bool above(float a, float b) { return a > b || (std::isnan(b) && !std::isnan(a)); }

void plan_topk(const float* scores, int64_t n, int64_t experts, int64_t k, bool renormalize,
               int32_t* rows, int32_t* offsets, float* weights, int32_t* inverse) {
  // inverse first holds the chosen experts, then, once segments are counted, packed positions.
  std::fill(offsets, offsets + experts + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = scores + i * experts;
    int32_t* chosen = inverse + i * k;
    for (int32_t e = 0; e < experts; ++e) {
      // An equal score goes behind those found before it: ties to the lowest expert.
      int64_t j = std::min<int64_t>(e, k);
      if (j == k && !above(row[e], row[chosen[k - 1]])) continue;
      if (j == k) --j;
      for (; j > 0 && above(row[e], row[chosen[j - 1]]); --j) chosen[j] = chosen[j - 1];
      chosen[j] = e;
    }
    for (int64_t j = 0; j < k; ++j) ++offsets[chosen[j] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t i = 0; i < n; ++i) {
    float total = 0.0f;
    for (int64_t j = 0; j < k; ++j) total += scores[i * experts + inverse[i * k + j]];
    for (int64_t j = 0; j < k; ++j) {
      const int32_t expert = inverse[i * k + j];
      const int32_t position = offsets[expert]++;
      const float score = scores[i * experts + expert];
      rows[position] = int32_t(i);
      weights[position] = renormalize ? score / total : score;
      inverse[i * k + j] = position;
    }
  }
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];  // the scatter moved them on
  offsets[0] = 0;
}

int64_t plan_partition(const int32_t* labels, int64_t n, int64_t segments, int32_t* rows,
                       int32_t* offsets, int32_t* inverse) {
  std::fill(offsets, offsets + segments + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] < -1 || labels[i] >= segments) return -1 - i;
    if (labels[i] >= 0) ++offsets[labels[i] + 1];
  }
  for (int64_t s = 0; s < segments; ++s) offsets[s + 1] += offsets[s];
  const int64_t kept = offsets[segments];
  for (int64_t i = 0; i < n; ++i) {
    inverse[i] = -1;
    if (labels[i] < 0) continue;
    inverse[i] = offsets[labels[i]]++;
    rows[inverse[i]] = int32_t(i);
  }
  for (int64_t s = segments; s > 0; --s) offsets[s] = offsets[s - 1];
  offsets[0] = 0;
  return kept;
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
