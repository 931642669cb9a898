// The choice of plan_topk by one warp a row: expert e is item e / 32 of lane e % 32, slot j is item
// j / 32 of lane j % 32, all in registers. Every operation on floats is the one
// pyruntime/ops/reference/score.py has, in its order and unfused, so that a plan is the same bits
// as on a CPU.
#pragma once

#include "common.cuh"

namespace pyrt {

// Values and bits of csrc/ops.h.
constexpr int kScoreNone = 0, kScoreSoftmax = 1, kScoreSigmoid = 2, kScoreSqrtSoftplus = 3;
constexpr int kTopKOverChosen = 4, kTopKNormalize = 8, kTopKSum2 = 16, kTopKRoundWeights = 32,
              kTopKRenormalizeUsed = 64;

struct TopKIn {
  const float* logits;               // [N, E]
  const float* bias;                 // [E] or null
  const float* limits;               // [N, 3] or null
  int k, flags, groups, top_groups;  // at most 64 slots and 32 groups
  float epsilon, scale;
  int num_rows, experts;
};

constexpr int kSlotItems = 2;
constexpr u32 kNever = 0;  // the key of what is not chosen: -inf

// Ascending with the value, the two zeros equal; -inf and NaN are kNever.
__device__ inline u32 key_of(float value) {
  if (!(value > never())) return kNever;
  const u32 bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(u32 key) {
  if (key == kNever) return never();
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// ---- scores ----

__device__ inline float unfused_exp(float x) {
  const float below = x < 88.0f ? x : 88.0f;
  const float clamped = below > -88.0f ? below : -88.0f;
  const float magic = 12582912.0f;
  const float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, 1.44269504088896341f), magic), magic);
  float r = __fsub_rn(clamped, __fmul_rn(n, 0.693359375f));
  r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  const u32 exponent = static_cast<u32>(static_cast<int>(n)) << 23;
  return x < -87.0f ? 0.0f : __uint_as_float(__float_as_uint(p) + exponent);
}

__device__ inline float twice_atanh(float w) {  // of |w| <= 1/3
  const float q = __fmul_rn(w, w);
  float p = 1.0f / 15;
#pragma unroll
  for (int n = 13; n > 0; n -= 2) p = __fadd_rn(__fmul_rn(p, q), 1.0f / n);
  return __fmul_rn(__fadd_rn(w, w), p);
}

__device__ inline float unfused_log1p(float u) {  // of u in [0, 1]
  return twice_atanh(__fdiv_rn(u, __fadd_rn(2.0f, u)));
}

// Natural logarithm of finite x >= 1 to 2 ulp.
__device__ inline float unfused_log(float x) {
  const u32 bits = __float_as_uint(x);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const float whole = __uint_as_float(bits - (static_cast<u32>(exponent) << 23));  // in [1, 2)
  const bool high = whole > 1.4140625f;
  const float part = high ? __fmul_rn(whole, 0.5f) : whole;
  const float n = static_cast<float>(exponent + high);
  const float p = __fadd_rn(twice_atanh(__fdiv_rn(__fsub_rn(part, 1.0f), __fadd_rn(part, 1.0f))),
                            __fmul_rn(n, -2.12194440e-4f));
  return __fadd_rn(p, __fmul_rn(n, 0.693359375f));
}

__device__ inline float score_of(float z, int kind) {
  if (kind == kScoreSigmoid) return __fdiv_rn(1.0f, __fadd_rn(1.0f, unfused_exp(-z)));
  if (kind != kScoreSqrtSoftplus) return z;
  const float magnitude = z > 0.0f ? z : -z;
  return __fsqrt_rn(__fadd_rn(z > 0.0f ? z : 0.0f, unfused_log1p(unfused_exp(-magnitude))));
}

__device__ inline float exp_below(float z, float largest) {
  return unfused_exp(z == largest ? 0.0f : __fsub_rn(z, largest));
}

// Scores of row n, and the keys its experts are chosen by.
template <int kItems>
__device__ void score_row(const TopKIn& in, int n, float (&score)[kItems], u32 (&key)[kItems]) {
  const float* logits = in.logits + i64(n) * in.experts;
  const int kind = in.flags & kTopKOverChosen ? kScoreNone : in.flags & 3;
  u32 alive = 0, top = kNever;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = lane_id() + i * kWarp;
    const float z = e < in.experts ? logits[e] : never();
    score[i] = z > never() ? z : never();
    alive |= u32(z > never()) << i;
    top = max(top, key_of(z));
  }
  if (kind == kScoreSoftmax) {
    const float largest = value_of(__reduce_max_sync(kAllLanes, top));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      score[i] = exp_below(score[i], largest);
      sum = __fadd_rn(sum, score[i]);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
#pragma unroll
    for (int i = 0; i < kItems; ++i) score[i] = __fdiv_rn(score[i], sum);
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) score[i] = score_of(score[i], kind);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool biased = in.bias && alive >> i & 1;
    const float c = biased ? __fadd_rn(score[i], in.bias[lane_id() + i * kWarp]) : score[i];
    key[i] = alive >> i & 1 ? key_of(c) : kNever;
  }
}

// ---- the choice ----

// Keys of groups that are not among the best become kNever; ties go to the lower group.
template <int kItems>
__device__ void mask_groups(const TopKIn& in, u32 (&key)[kItems]) {
  const int size = in.experts / in.groups;
  u32 worth = kNever;  // of the group with this lane's number
  for (int g = 0; g < in.groups; ++g) {
    u32 best = kNever, second = kNever;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane_id() + i * kWarp;
      const u32 mine = e >= g * size && e < (g + 1) * size ? key[i] : kNever;
      second = max(second, min(best, mine));
      best = max(best, mine);
    }
    const u32 top = __reduce_max_sync(kAllLanes, best);
    if (in.flags & kTopKSum2) {
      const int owner = __ffs(__ballot_sync(kAllLanes, best == top)) - 1;
      const u32 next = __reduce_max_sync(kAllLanes, lane_id() == owner ? second : best);
      if (lane_id() == g) worth = key_of(__fadd_rn(value_of(top), value_of(next)));
    } else if (lane_id() == g) {
      worth = top;
    }
  }
  u32 kept = 0;
  for (int t = 0; t < in.top_groups; ++t) {
    const bool free = lane_id() < in.groups && !(kept >> lane_id() & 1);
    const u32 top = __reduce_max_sync(kAllLanes, free ? worth : kNever);
    const u32 winners = __ballot_sync(kAllLanes, free && worth == top);
    kept |= winners & -winners;
  }
  for (int g = 0; g < in.groups; ++g) {
    if (kept >> g & 1) continue;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane_id() + i * kWarp;
      if (e >= g * size && e < (g + 1) * size) key[i] = kNever;
    }
  }
}

// A row's slots across the warp.
struct Slots {
  float value[kSlotItems];
  int id[kSlotItems];

  __device__ float at(int j) const {  // j is the same in all lanes
    return __shfl_sync(kAllLanes, j < kWarp ? value[0] : value[1], j % kWarp);
  }
  __device__ float sum(int count) const {
    float total = 0.0f;
    for (int j = 0; j < count; ++j) total = __fadd_rn(total, at(j));
    return total;
  }
  __device__ void divide(float by) {
    value[0] = __fdiv_rn(value[0], by);
    value[1] = __fdiv_rn(value[1], by);
  }
};

// The k largest keys, ties to the lower expert; returns how many there were.
template <int kItems>
__device__ int take_largest(int k, const float (&score)[kItems], u32 (&key)[kItems], Slots* slots) {
  constexpr int kNone = 0x7fffffff;
  for (int j = 0; j < k; ++j) {
    u32 best = kNever;
    int id = kNone;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (key[i] > best) best = key[i], id = lane_id() + i * kWarp;
    const u32 top = __reduce_max_sync(kAllLanes, best);
    if (top == kNever) return j;
    id = __reduce_min_sync(kAllLanes, best == top ? id : kNone);
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (lane_id() + i * kWarp == id) value = score[i], key[i] = kNever;
    value = __shfl_sync(kAllLanes, value, id % kWarp);
    if (lane_id() != j % kWarp) continue;
    if (j < kWarp)
      slots->value[0] = value, slots->id[0] = id;
    else
      slots->value[1] = value, slots->id[1] = id;
  }
  return k;
}

// Softmax numerators of the first `chosen` slots.
__device__ inline void exp_of_slots(int chosen, Slots* slots) {
  u32 top = kNever;
#pragma unroll
  for (int i = 0; i < kSlotItems; ++i)
    if (lane_id() + i * kWarp < chosen) top = max(top, key_of(slots->value[i]));
  const float largest = value_of(__reduce_max_sync(kAllLanes, top));
#pragma unroll
  for (int i = 0; i < kSlotItems; ++i) slots->value[i] = exp_below(slots->value[i], largest);
}

// How many of `chosen` slots come before limits (slots, gap, mass) cut.
__device__ inline int within(const float* limits, const Slots& share, int chosen) {
  const float total = share.sum(chosen);
  float before = 0.0f, last = share.at(0);
  for (int j = 1; j < chosen; ++j) {
    const float value = share.at(j);
    before = __fadd_rn(before, last);
    if (float(j) >= limits[0] || __fsub_rn(last, value) > limits[1] ||
        __fdiv_rn(before, total) >= limits[2])
      return j;
    last = value;
  }
  return chosen;
}

// ids and weights [N, k] of row n; one warp.
template <int kItems>
__device__ void choose_row(const TopKIn& in, int n, int* ids, float* weights) {
  float score[kItems];
  u32 key[kItems];
  score_row(in, n, score, key);
  if (in.groups > 1) mask_groups(in, key);
  Slots slots = {};
  const int chosen = take_largest(in.k, score, key, &slots);
  const bool over_chosen = in.flags & kTopKOverChosen;
  if (over_chosen) exp_of_slots(chosen, &slots);
  int used = chosen;
  if (in.limits) {
    Slots share = slots;
    if (over_chosen) share.divide(slots.sum(chosen));
    used = within(in.limits + 3 * i64(n), share, chosen);
  }
  const int counted = in.flags & kTopKRenormalizeUsed ? used : chosen;
  if (over_chosen) slots.divide(slots.sum(counted));
  if (in.flags & kTopKNormalize) slots.divide(__fadd_rn(slots.sum(counted), in.epsilon));
#pragma unroll
  for (int i = 0; i < kSlotItems; ++i) {
    const int j = lane_id() + i * kWarp;
    if (j >= in.k) continue;
    float weight = __fmul_rn(slots.value[i], in.scale);
    if (in.flags & kTopKRoundWeights) weight = __uint_as_float(pack_bf16(weight, 0.0f) << 16);
    ids[i64(n) * in.k + j] = j < used ? slots.id[i] : -1;
    weights[i64(n) * in.k + j] = j < used ? weight : 0.0f;
  }
}

template <int kItems>
__device__ void choose_rows(const TopKIn& in, int* ids, float* weights) {
  const int warps = blockDim.x / kWarp;
  for (int n = blockIdx.x * warps + warp_id(); n < in.num_rows; n += gridDim.x * warps)
    choose_row<kItems>(in, n, ids, weights);
}

}  // namespace pyrt
