// The choice of plan_topk: logits to ids and weights of a row's slots. Every operation on floats is
// the one pyruntime/ops/reference/score.py has, in its order (see unfused.h): a plan is the same
// bits on every instruction set. Limit: one read of the logits; in practice k dependent searches a
// row.
#include <omp.h>

#include <algorithm>
#include <cmath>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/scratch.h"
#include "cpu/unfused.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kParallelLogits = 32 << 10;  // below, a second thread costs more than it chooses

constexpr int kStep = 64;  // experts whose comparisons fit one mask
constexpr int kVecs = kStep / kWidth;

vec sqrt_softplus(vec z) {
  vec v = greater(z, all(0.0f)) + unfused_log1p(unfused_exp(z > 0.0f ? -z : z));
  for (int i = 0; i < kWidth; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Bit i: lane i of a equals that of b.
uint64_t equal_lanes(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  return uint64_t(_mm256_movemask_ps((__m256)(a == b)));
#elif defined(__SSE2__)
  return uint64_t(_mm_movemask_ps((__m128)(a == b)));
#else
  uint64_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint64_t(a[i] == b[i]) << i;
  return mask;
#endif
}

// What one row is worked out in; E and k are padded to whole steps.
struct Row {
  float* score;  // [E] what weights come from
  float* value;  // [E] what segments are chosen by, -inf for never
  float* worth;  // [groups]
  float* slot;   // [k] scores of the chosen ones, best first
  float* share;  // [k]
};

int64_t padded(int64_t count) { return (count + kStep - 1) / kStep * kStep; }

float softmax_sum(const float* values, int64_t count) {
  LaneSum sum;
  for (int64_t e = 0; e < count; e += kSumLanes)
    for (int i = 0; i < kSumVecs; ++i) sum.part[i] += at(values + e + i * kWidth);
  return sum.fold();
}

// Fills score and value; false when every logit is -inf or NaN.
bool score_row(const TopKArgs& args, const float* logits, const Row& row) {
  const int64_t count = args.experts, end = padded(count);
  vec column = all(kNever);
  for (int64_t e = 0; e < end; e += kWidth) {
    vec z = some(logits + e, count - e);
    z = z == z ? z : all(kNever);
    store_as(row.value + e, z);
    column = greater(column, z);
  }
  const float largest = largest_of(column);
  if (!(largest > kNever)) return false;

  const bool over_chosen = args.rule.flags & kTopKOverChosen;
  const Score kind = over_chosen ? Score::kNone : Score(args.rule.flags & 3);
  for (int64_t e = 0; e < end; e += kWidth) {
    const vec z = at(row.value + e);
    vec s = z;
    if (kind == Score::kSoftmax)
      s = unfused_exp(z == largest ? all(0.0f) : z - largest);
    else if (kind == Score::kSigmoid)
      s = unfused_sigmoid(z);
    else if (kind == Score::kSqrtSoftplus)
      s = sqrt_softplus(z);
    store_as(row.score + e, s);
  }
  const float total = kind == Score::kSoftmax ? softmax_sum(row.score, end) : 1.0f;
  for (int64_t e = 0; e < end; e += kWidth) {
    vec c = at(row.score + e) / total;
    store_as(row.score + e, c);
    if (args.bias) c = c + some(args.bias + e, count - e);
    c = at(row.value + e) > kNever ? c : all(kNever);
    store_as(row.value + e, c == c ? c : all(kNever));
  }
  return true;
}

// Sets value to -inf where the group is not among the best; ties go to the lower group.
void mask_groups(const TopKArgs& args, const Row& row) {
  const int64_t groups = args.rule.groups, size = args.experts / groups;
  const bool two = args.rule.flags & kTopKSum2;
  for (int64_t g = 0; g < groups; ++g) {
    const float* values = row.value + g * size;
    BestTwo columns;
    int64_t e = 0;
    for (; e + kWidth <= size; e += kWidth) columns.take(at(values + e));
    columns.fold();
    float best = columns.high[0], second = columns.low[0];
    for (; e < size; ++e) {
      second = std::max(second, std::min(best, values[e]));
      best = std::max(best, values[e]);
    }
    const float worth = two ? best + second : best;
    row.worth[g] = std::isnan(worth) ? kNever : worth;  // infinity with a group of one
  }
  for (int64_t g = 0; g < groups; ++g) {
    int64_t rank = 0;
    for (int64_t h = 0; h < groups; ++h)
      rank += row.worth[h] > row.worth[g] || (row.worth[h] == row.worth[g] && h < g);
    if (rank >= args.rule.top_groups)
      std::fill(row.value + g * size, row.value + (g + 1) * size, kNever);
  }
}

// ids and slot of the k largest values, ties to the lower id; returns how many there were. A round
// finds the largest by columns, then the first that equals it.
int64_t take_largest(const Row& row, int64_t experts, int64_t k, int32_t* ids) {
  for (int64_t j = 0; j < k; ++j) {
    vec column = at(row.value);
    for (int64_t e = kWidth; e < experts; e += kWidth) column = greater(column, at(row.value + e));
    const float largest = largest_of(column);
    if (!(largest > kNever)) return j;
    int64_t id = 0;
    for (uint64_t found = 0;; id += kStep) {
      for (int i = 0; i < kVecs; ++i)
        found |= equal_lanes(at(row.value + id + i * kWidth), all(largest)) << i * kWidth;
      if (!found) continue;
      id += __builtin_ctzll(found);
      break;
    }
    ids[j] = int32_t(id);
    row.slot[j] = row.score[id];
    float* block = row.value + id / kWidth * kWidth;  // rewritten whole: it is read whole next
    store_as(block, lanes() == int32_t(id % kWidth) ? all(kNever) : at(block));
  }
  return k;
}

// The same for at most kStep experts, which stay in registers: half of a round above is waiting for
// the block just written to be read again.
int64_t take_largest_held(const Row& row, int64_t k, int32_t* ids) {
  vec value[kVecs];
  for (int i = 0; i < kVecs; ++i) value[i] = at(row.value + i * kWidth);
  for (int64_t j = 0; j < k; ++j) {
    vec columns[2] = {value[0], value[1]};
    for (int i = 2; i < kVecs; ++i) columns[i % 2] = greater(columns[i % 2], value[i]);
    const float largest = largest_of(greater(columns[0], columns[1]));
    if (!(largest > kNever)) return j;
    uint64_t found = 0;
    for (int i = 0; i < kVecs; ++i) found |= equal_lanes(value[i], all(largest)) << i * kWidth;
    const int32_t id = __builtin_ctzll(found);
    ids[j] = id;
    row.slot[j] = row.score[id];
    for (int i = 0; i < kVecs; ++i) value[i] = lanes() + i * kWidth == id ? all(kNever) : value[i];
  }
  return k;
}

float slot_sum(const float* values, int64_t count) {
  float total = 0.0f;
  for (int64_t j = 0; j < count; ++j) total += values[j];
  return total;
}

void exp_of_slots(float* slot, int64_t count) {
  const float largest = *std::max_element(slot, slot + std::max<int64_t>(count, 1));
  for (int64_t j = 0; j < count; j += kWidth) {
    const vec z = at(slot + j);
    store_as(slot + j, unfused_exp(z == largest ? all(0.0f) : z - largest));
  }
}

// How many of `count` slots with scores s come before limits (slots, gap, mass) cut.
int64_t within(const float* limits, const float* s, int64_t count) {
  const float total = slot_sum(s, count);
  float before = 0.0f;
  for (int64_t j = 1; j < count; ++j) {
    before += s[j - 1];
    if (float(j) >= limits[0] || s[j - 1] - s[j] > limits[1] || before / total >= limits[2])
      return j;
  }
  return count;
}

float round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (!std::isnan(value)) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The weights of `chosen` slots, and -1 into ids where limits cut.
void weigh(const TopKArgs& args, int64_t n, const Row& row, int64_t chosen) {
  const TopKRule& rule = args.rule;
  int32_t* ids = args.ids + n * rule.k;
  float* weights = args.weights + n * rule.k;
  const bool over_chosen = rule.flags & kTopKOverChosen;
  if (over_chosen) exp_of_slots(row.slot, chosen);

  int64_t used = chosen;
  if (args.limits) {
    const float total = over_chosen ? slot_sum(row.slot, chosen) : 1.0f;
    for (int64_t j = 0; j < chosen; ++j) row.share[j] = row.slot[j] / total;
    used = within(args.limits + 3 * n, row.share, chosen);
  }
  const int64_t counted = rule.flags & kTopKRenormalizeUsed ? used : chosen;
  const float divisor = over_chosen ? slot_sum(row.slot, counted) : 1.0f;
  for (int64_t j = 0; j < counted; ++j) row.slot[j] = row.slot[j] / divisor;
  const bool normalize = rule.flags & kTopKNormalize;
  const float total = normalize ? slot_sum(row.slot, counted) + rule.epsilon : 1.0f;
  for (int64_t j = 0; j < used; ++j) {
    const float weight = row.slot[j] / total * rule.scale;
    weights[j] = rule.flags & kTopKRoundWeights ? round_to_bf16(weight) : weight;
  }
  std::fill(ids + used, ids + rule.k, -1);
}

}  // namespace

void choose_topk(const TopKArgs& args) {
  const int64_t width = padded(args.experts), slots = padded(args.rule.k);
#pragma omp parallel if (args.rows > 1 && args.rows * args.experts >= kParallelLogits)
  {
    static thread_local Scratch scratch;
    float* memory = scratch.take<float>(3 * width + 2 * slots);
    std::fill(memory, memory + 3 * width + 2 * slots, 0.0f);  // what pads a row is read, not used
    const Row row{memory, memory + width, memory + 2 * width, memory + 3 * width,
                  memory + 3 * width + slots};
#pragma omp for schedule(static)
    for (int64_t n = 0; n < args.rows; ++n) {
      int32_t* ids = args.ids + n * args.rule.k;
      int64_t chosen = 0;
      if (score_row(args, args.logits + n * args.experts, row)) {
        if (args.rule.groups > 1) mask_groups(args, row);
        chosen = args.experts <= kStep ? take_largest_held(row, args.rule.k, ids)
                                       : take_largest(row, args.experts, args.rule.k, ids);
      }
      weigh(args, n, row, chosen);
    }
  }
}

}  // namespace pyrt::PYRT_ISA
