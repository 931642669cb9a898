// plan_exit: class rows to logits, a confidence, and a label per row: 0 continues, -1 leaves. The
// plan is the counting sort of plan.cu over these labels; nothing visits the host.
//   plan_exit_rows   one block per row does it all: few classes, or very wide rows
//   plan_exit_head   logits alone, a block for 4 rows and 64 outputs: then weights are read often
//                    enough to matter, and one row is work for many blocks
//   plan_exit_gate   a warp per row judges logits that are there
// Which of them run depends on the head alone, so that a row is the same bits in every batch. What
// decides is the operations of pyruntime/ops/reference/{exit,score}.py, unfused and in their order.
//
// Bytes moved: outputs * width weights per row (from L2), per 4 rows in plan_exit_head. Limit:
// latency, for ten classes; L2 bandwidth for a thousand.
#include "common.cuh"
#include "topk.cuh"

namespace pyrt {

// Values and bits of csrc/ops.h.
constexpr int kExitMaxProb = 1, kExitMaxLogit = 2, kExitEntropy = 3, kExitMargin = 4,
              kExitPatience = 5, kExitLearned = 6;  // 0 is jei_dnn
constexpr int kExitStrict = 8, kExitIndependent = 16;
constexpr int kHeadRows = 4, kHeadOutputs = 64;  // of one block of plan_exit_head
constexpr float kLowest = -88.0f;                // exp is 0 there, and a product with it is not NaN

struct ExitIn {
  const void* x;             // [T, D] float32 or bf16
  const int* class_rows;     // [n] or null for the identity
  const float* weight;       // [N, D]
  const float* bias;         // [N] or null
  const float* norm_weight;  // [D] or null: no norm
  const float* norm_bias;    // [D]
  float* outputs;            // [n, N]: written by a head, read by a gate
  float* state;              // [n, 3]
  const float* limits;       // [n, 2]
  float* total;              // [n, C] or null
  float* logits;             // [n, C], maybe outputs; null: outputs are the logits
  float* confidence;         // [n]
  int* labels;               // [n]
  float gate[5];
  float eps;
  int flags, narrow;  // narrow: x is bf16
  int count, classes, out_features, width;
};

// ---- logits ----

// Row n as float32 in y [D], normalised where the head has a norm; one warp.
__device__ inline void class_row(const ExitIn& in, int n, float* y) {
  const i64 start = i64(in.class_rows ? in.class_rows[n] : n) * in.width;
  float total = 0.0f;
  for (int k = lane_id(); k < in.width; k += kWarp) {
    y[k] = in.narrow ? to_float(static_cast<const bf16*>(in.x)[start + k])
                     : static_cast<const float*>(in.x)[start + k];
    total += y[k];
  }
  if (!in.norm_weight) return;
  const float mean = warp_sum(total) / in.width;
  float squares = 0.0f;
  for (int k = lane_id(); k < in.width; k += kWarp) squares += (y[k] - mean) * (y[k] - mean);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(squares) / in.width + in.eps));
  for (int k = lane_id(); k < in.width; k += kWarp)
    y[k] = (y[k] - mean) * scale * in.norm_weight[k] + in.norm_bias[k];
}

extern __shared__ float class_rows_of_block[];  // [kRows][D]

// Outputs [first, last) of rows n .. n + kRows - 1; a block of whole warps.
template <int kRows>
__device__ void run_head(const ExitIn& in, int n, int first, int last) {
  float* y = class_rows_of_block;
  const int warps = blockDim.x / kWarp;
  for (int r = warp_id(); r < kRows; r += warps)
    class_row(in, min(n + r, in.count - 1), y + r * in.width);
  __syncthreads();
  for (int c = first + warp_id(); c < last; c += warps) {
    const float* weight = in.weight + i64(c) * in.width;
    float sum[kRows] = {};
#pragma unroll 4
    for (int k = lane_id(); k < in.width; k += kWarp) {
      const float w = weight[k];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += w * y[r * in.width + k];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float value = warp_sum(sum[r]) + (in.bias ? in.bias[c] : 0.0f);
      if (lane_id() == 0 && n + r < in.count) in.outputs[i64(n + r) * in.out_features + c] = value;
    }
  }
}

// ---- confidence: every lane of a warp knows it ----

struct Softmax {  // its denominator, and the entropy in nats
  float total, entropy;
};

// Of z sharpened `power` times.
__device__ inline Softmax softmax_of(const float* z, int classes, float largest, float power) {
  float total = 0.0f, weighted = 0.0f;
  for (int c = lane_id(); c < classes; c += kWarp) {
    const float away = __fsub_rn(z[c], largest);
    const float below = __fmul_rn(away > kLowest ? away : kLowest, power);
    const float value = unfused_exp(below);
    total = __fadd_rn(total, value);
    weighted = __fadd_rn(weighted, __fmul_rn(below, value));
  }
  total = warp_sum(total);
  return {total, __fsub_rn(unfused_log(total), __fdiv_rn(warp_sum(weighted), total))};
}

__device__ inline float sigmoid_of(float x) { return score_of(x, kScoreSigmoid); }

// Adds the gate's share to the mass of the row.
__device__ inline float jei_dnn(const ExitIn& in, const float* limits, float* mass,
                                const float (&features)[4]) {
  float logit = __fmul_rn(features[0], in.gate[0]);
#pragma unroll
  for (int i = 1; i < 4; ++i) logit = __fadd_rn(logit, __fmul_rn(features[i], in.gate[i]));
  const float share = sigmoid_of(__fadd_rn(logit, in.gate[4])), before = *mass;
  if (!(in.flags & kExitIndependent)) {
    *mass = __fadd_rn(before, share);
    return __fadd_rn(before, __fmul_rn(share, limits[1]));
  }
  const float left = __fsub_rn(1.0f, before), ratio = __fdiv_rn(share, left);
  const float hazard = ratio > 1.0f ? 1.0f : ratio;
  *mass = __fsub_rn(1.0f, __fmul_rn(left, __fsub_rn(1.0f, hazard)));
  return __fmul_rn(hazard, __fmul_rn(0.5f, limits[1]));
}

// Of finite logits z; largest and second (-inf of one class) are theirs. state and limits of the
// row: lane 0 alone touches them, and its result counts.
__device__ inline float confidence_of(const ExitIn& in, const float* z, float learned,
                                      float largest, float second, float* state,
                                      const float* limits) {
  const int criterion = in.flags & 7;
  if (criterion == kExitLearned) return sigmoid_of(learned);
  if (criterion == kExitMaxLogit) return largest;
  if (criterion == kExitPatience) {
    int named = in.classes;
    for (int c = lane_id(); c < in.classes && named == in.classes; c += kWarp)
      if (z[c] == largest) named = c;
    named = __reduce_min_sync(kAllLanes, named) + 1;
    if (lane_id() > 0) return 0.0f;
    state[1] = state[2] == static_cast<float>(named) ? __fadd_rn(state[1], 1.0f) : 0.0f;
    state[2] = static_cast<float>(named);
    return state[1];
  }
  const Softmax p = softmax_of(z, in.classes, largest, 1.0f);
  if (criterion == kExitEntropy) return -p.entropy;
  const float probability = __fdiv_rn(1.0f, p.total);
  if (criterion == kExitMaxProb) return probability;
  const float away = __fsub_rn(second, largest);
  const float lead = __fsub_rn(1.0f, unfused_exp(away > kLowest ? away : kLowest));
  const float margin = __fdiv_rn(lead, p.total);
  if (criterion == kExitMargin) return margin;
  const Softmax squares = softmax_of(z, in.classes, largest, 2.0f);
  if (lane_id() > 0) return 0.0f;
  return jei_dnn(in, limits, state, {probability, p.entropy, margin, squares.entropy});
}

// Reads the outputs of row n; writes its logits, total, state, confidence and label. One warp.
__device__ inline void judge(const ExitIn& in, int n) {
  const float* outputs = in.outputs + i64(n) * in.out_features;
  float* total = in.total ? in.total + i64(n) * in.classes : nullptr;
  float* logits = in.logits ? in.logits + i64(n) * in.classes : nullptr;
  const bool scored = (in.flags & 7) == kExitLearned;
  const float learned = scored ? outputs[in.classes] : 0.0f;
  const float limit = -never();
  float largest = never(), second = never();
  bool finite = learned < limit && learned > never();
  for (int c = lane_id(); c < in.classes; c += kWarp) {
    float value = outputs[c];
    if (total) total[c] = value = __fadd_rn(total[c], value);
    if (logits) logits[c] = value;
    finite = finite && value < limit && value > never();
    const float low = value > largest ? largest : value;
    second = low > second ? low : second;
    largest = value > largest ? value : largest;
  }
  float* state = in.state + 3 * i64(n);
  float confidence = __uint_as_float(0x7fc00000u);
  if (__ballot_sync(kAllLanes, finite) == kAllLanes) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float high = __shfl_xor_sync(kAllLanes, largest, step);
      const float next = __shfl_xor_sync(kAllLanes, second, step);
      const float low = high > largest ? largest : high;
      second = next > second ? next : second;
      second = low > second ? low : second;
      largest = high > largest ? high : largest;
    }
    confidence = confidence_of(in, logits ? logits : outputs, learned, largest, second, state,
                               in.limits + 2 * i64(n));
  } else if ((in.flags & 7) == kExitPatience && lane_id() == 0) {
    state[1] = state[2] = 0.0f;
  }
  if (lane_id() > 0) return;
  const float threshold = in.limits[2 * i64(n)];
  const bool leaves = in.flags & kExitStrict ? confidence > threshold : confidence >= threshold;
  in.confidence[n] = confidence;
  in.labels[n] = leaves ? -1 : 0;
}

extern "C" __global__ void __launch_bounds__(256) plan_exit_rows(ExitIn in) {
  run_head<1>(in, blockIdx.x, 0, in.out_features);
  __syncthreads();  // also orders the block's own global writes before its reads
  if (warp_id() == 0) judge(in, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(256) plan_exit_head(ExitIn in) {
  const int first = blockIdx.y * kHeadOutputs;
  run_head<kHeadRows>(in, blockIdx.x * kHeadRows, first,
                      min(first + kHeadOutputs, in.out_features));
}

extern "C" __global__ void __launch_bounds__(256) plan_exit_gate(ExitIn in) {
  const int n = blockIdx.x * (blockDim.x / kWarp) + warp_id();
  if (n < in.count) judge(in, n);
}

}  // namespace pyrt
