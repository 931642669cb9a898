// The choice of plan_topk: logits to ids and weights of a row's slots. Every operation on floats is
// the one pyruntime/ops/reference/score.py has, in its order (this file is built with contraction
// off, and has its own exp because that of simd.h is fused elsewhere): a plan is the same bits on
// every instruction set. Limit: one read of the logits; in practice k dependent searches a row.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/scratch.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr i32x16 kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int64_t kParallelLogits = 32 << 10;  // below, a second thread costs more than it chooses

f32x16 greater(f32x16 a, f32x16 b) { return a > b ? a : b; }

// e^x to 2 ulp; 0 below -87, e^88 above 88; no NaN.
f32x16 unfused_exp(f32x16 x) {
  const f32x16 below = x < 88.0f ? x : splat(88.0f);
  const f32x16 clamped = below > -88.0f ? below : splat(-88.0f);
  const f32x16 n = round_nearest(clamped * 1.44269504088896341f);
  f32x16 r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const u32x16 exponent = (u32x16) __builtin_convertvector(n, i32x16) << 23;
  return x < -87.0f ? splat(0.0f) : (f32x16)((u32x16)p + exponent);
}

// log(1 + u) of u in [0, 1] as 2 atanh(u / (2 + u)).
f32x16 unfused_log1p(f32x16 u) {
  const f32x16 w = u / (2.0f + u), q = w * w;
  f32x16 p = splat(1.0f / 15);
  for (float n = 13.0f; n > 0.0f; n -= 2.0f) p = p * q + 1.0f / n;
  return (w + w) * p;
}

f32x16 sqrt_softplus(f32x16 z) {
  f32x16 v = (z > 0.0f ? z : splat(0.0f)) + unfused_log1p(unfused_exp(z > 0.0f ? -z : z));
  for (int i = 0; i < 16; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Bit i: lane i of a equals that of b.
uint64_t equal_lanes(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#else
  const i32x16 equal = a == b;
  uint64_t mask = 0;
#if defined(__AVX2__)
  __m256 half[2];
  std::memcpy(half, &equal, sizeof equal);
  for (int i = 0; i < 2; ++i) mask |= uint64_t(_mm256_movemask_ps(half[i])) << 8 * i;
#else
  for (int i = 0; i < 16; ++i) mask |= uint64_t(equal[i] != 0) << i;
#endif
  return mask;
#endif
}

// What one row is worked out in; E is padded to whole masks of 64.
struct Row {
  float* score;  // [E] what weights come from
  float* value;  // [E] what segments are chosen by, -inf for never
  float* worth;  // [groups]
  float* slot;   // [k] scores of the chosen ones, best first
  float* share;  // [k]
  int64_t blocks;
};

int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }

// Fills score and value; false when every logit is -inf or NaN.
bool score_row(const TopKArgs& args, const float* logits, const Row& row) {
  const int64_t rest = args.experts % 16;
  f32x16 column = splat(kNever);
  for (int64_t b = 0; b < row.blocks; ++b) {
    const bool part = rest && b + 1 == row.blocks;
    f32x16 z = part ? load_part(logits + 16 * b, rest) : load(logits + 16 * b);
    if (part) z = kLanes < int32_t(rest) ? z : splat(kNever);
    z = z == z ? z : splat(kNever);
    store(row.value + 16 * b, z);
    column = greater(column, z);
  }
  for (int64_t b = row.blocks; b % 4; ++b) store(row.value + 16 * b, splat(kNever));
  const float largest = max(column);
  if (!(largest > kNever)) return false;

  const bool over_chosen = args.rule.flags & kTopKOverChosen;
  const Score kind = over_chosen ? Score::kNone : Score(args.rule.flags & 3);
  f32x16 sums[2] = {};  // 32 lanes, as a warp has
  for (int64_t b = 0; b < row.blocks; ++b) {
    const f32x16 z = load(row.value + 16 * b);
    f32x16 s = z;
    if (kind == Score::kSoftmax) {
      s = unfused_exp(z == largest ? splat(0.0f) : z - largest);
      sums[b % 2] += s;
    } else if (kind == Score::kSigmoid) {
      s = 1.0f / (1.0f + unfused_exp(-z));
    } else if (kind == Score::kSqrtSoftplus) {
      s = sqrt_softplus(z);
    }
    store(row.score + 16 * b, s);
  }
  const float total = kind == Score::kSoftmax ? sum(sums[0] + sums[1]) : 1.0f;
  for (int64_t b = 0; b < row.blocks; ++b) {
    f32x16 s = load(row.score + 16 * b) / total;
    store(row.score + 16 * b, s);
    if (args.bias) {
      const bool part = rest && b + 1 == row.blocks;
      s = s + (part ? load_part(args.bias + 16 * b, rest) : load(args.bias + 16 * b));
    }
    const f32x16 never = splat(kNever);
    s = load(row.value + 16 * b) > kNever ? s : never;
    store(row.value + 16 * b, s == s ? s : never);
  }
  return true;
}

// Sets value to -inf where the group is not among the best; ties go to the lower group.
void mask_groups(const TopKArgs& args, const Row& row) {
  const int64_t groups = args.rule.groups, size = args.experts / groups;
  const bool two = args.rule.flags & kTopKSum2;
  for (int64_t g = 0; g < groups; ++g) {
    float best = kNever, second = kNever;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const float value = row.value[e];
      second = std::max(second, std::min(best, value));
      best = std::max(best, value);
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
// finds the largest by columns (lane l has experts l, l + 16, ...), then the first that equals it.
int64_t take_largest(const Row& row, int64_t k, int32_t* ids) {
  for (int64_t j = 0; j < k; ++j) {
    f32x16 column = load(row.value);
    for (int64_t b = 1; b < row.blocks; ++b) column = greater(column, load(row.value + 16 * b));
    const float largest = max(column);
    if (!(largest > kNever)) return j;
    int64_t first = 0;
    uint64_t found = 0;
    for (;; first += 64) {
      for (int b = 0; b < 4; ++b)
        found |= equal_lanes(load(row.value + first + 16 * b), splat(largest)) << 16 * b;
      if (found) break;
    }
    const int64_t id = first + __builtin_ctzll(found);
    ids[j] = int32_t(id);
    row.slot[j] = row.score[id];
    float* block = row.value + id / 16 * 16;  // rewritten whole: it is loaded whole right away
    store(block, kLanes == int32_t(id % 16) ? splat(kNever) : load(block));
  }
  return k;
}

float slot_sum(const float* values, int64_t count) {
  float total = 0.0f;
  for (int64_t j = 0; j < count; ++j) total += values[j];
  return total;
}

void exp_of_slots(float* slot, int64_t count) {
  std::fill(slot + count, slot + (count + 15) / 16 * 16, kNever);
  f32x16 column = splat(kNever);
  for (int64_t j = 0; j < count; j += 16) column = greater(column, load(slot + j));
  const float largest = max(column);
  for (int64_t j = 0; j < count; j += 16) {
    const f32x16 z = load(slot + j);
    store(slot + j, unfused_exp(z == largest ? splat(0.0f) : z - largest));
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
    const Row row{memory,
                  memory + width,
                  memory + 2 * width,
                  memory + 3 * width,
                  memory + 3 * width + slots,
                  (args.experts + 15) / 16};
#pragma omp for schedule(static)
    for (int64_t n = 0; n < args.rows; ++n) {
      int32_t* ids = args.ids + n * args.rule.k;
      int64_t chosen = 0;
      if (score_row(args, args.logits + n * args.experts, row)) {
        if (args.rule.groups > 1) mask_groups(args, row);
        chosen = take_largest(row, args.rule.k, ids);
      }
      weigh(args, n, row, chosen);
    }
  }
}

}  // namespace pyrt::PYRT_ISA
