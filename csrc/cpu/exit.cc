// plan_exit: class rows to logits, a confidence, and the rows that go on, in one call. The head is
// a segment_matmul, whose rows do not see each other; what follows is the operations of
// pyruntime/ops/reference/{exit,score}.py in their order (see unfused.h): equal logits are equal
// bits on every instruction set. Limit: one read of the head's weights.
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/unfused.h"
#include "ops.h"

namespace pyrt::PYRT_ISA {
namespace {

constexpr int64_t kParallelElements = 64 << 10;  // below, a second thread costs more than it reads
constexpr int64_t kParallelLogits = 16 << 10;
constexpr float kLowest = -88.0f;  // exp is 0 there, and a product with it is not NaN

// ---- logits ----

// Class row n as float32, normalised where the head has a norm.
template <class T>
void class_row(const ExitArgs& args, int64_t n, float* out) {
  const ExitHead& head = args.head;
  const int64_t width = head.width, whole = width / 16 * 16, rest = width - whole;
  const T* x = static_cast<const T*>(args.x) + (args.class_rows ? args.class_rows[n] : n) * width;
  f32x16 total{};
  for (int64_t h = 0; h < whole; h += 16) {
    store(out + h, load(x + h));
    total += load(out + h);
  }
  store_part(out + whole, load_part(x + whole, rest), rest);
  if (!head.norm_weight) return;

  const float mean = sum(total + load_part(out + whole, rest)) / float(width);
  f32x16 squares{};
  for (int64_t h = 0; h < whole; h += 16) {
    const f32x16 away = load(out + h) - mean;
    squares += away * away;
  }
  f32x16 last{};
  for (int64_t i = 0; i < rest; ++i) last[i] = out[whole + i] - mean;
  const float scale = 1.0f / std::sqrt(sum(squares + last * last) / float(width) + head.eps);
  for (int64_t h = 0; h < whole; h += 16) {
    const f32x16 bias = head.norm_bias ? load(head.norm_bias + h) : f32x16{};
    store(out + h, (load(out + h) - mean) * scale * load(head.norm_weight + h) + bias);
  }
  for (int64_t h = whole; h < width; ++h) {
    const float bias = head.norm_bias ? head.norm_bias[h] : 0.0f;
    out[h] = (out[h] - mean) * scale * head.norm_weight[h] + bias;
  }
}

// All outputs of the head [n, N]; x [n, D] is scratch.
void run_head(const ExitArgs& args, float* x, float* outputs) {
  const ExitHead& head = args.head;
#pragma omp parallel for schedule(static) if (args.count * head.width >= kParallelElements)
  for (int64_t n = 0; n < args.count; ++n)
    args.dtype == DType::kBFloat16 ? class_row<bf16>(args, n, x + n * head.width)
                                   : class_row<float>(args, n, x + n * head.width);
  MatmulArgs product{};
  product.x = x;
  product.weight = head.weight;
  product.bias = head.bias;
  product.out = outputs;
  product.plan.kept = args.count;
  product.in_features = head.width;
  product.out_features = head.outputs;
  segment_matmul(product);
}

// ---- confidence ----

int64_t padded(int64_t classes) { return (classes + kSumLanes - 1) / kSumLanes * kSumLanes; }

// The softmax of a row sharpened `power` times: its denominator, and the entropy in nats.
struct Softmax {
  float total, entropy;
};

Softmax softmax_of(const float* z, int64_t end, float largest, float power) {
  LaneSum total, weighted;
  for (int64_t c = 0; c < end; c += kSumLanes) {
    for (int i = 0; i < kSumVecs; ++i) {
      const vec below = greater(at(z + c + i * kWidth) - largest, all(kLowest)) * power;
      const vec value = unfused_exp(below);
      total.part[i] += value;
      weighted.part[i] += below * value;
    }
  }
  const float sum = total.fold();
  return {sum, unfused_log(all(sum))[0] - weighted.fold() / sum};
}

float sigmoid_of(float x) { return unfused_sigmoid(all(x))[0]; }

// Adds the gate's share to the mass of the row.
float jei_dnn(const ExitRule& rule, const float* limits, float* mass, float largest, float entropy,
              float margin, float entropy_of_squares) {
  const float* gate = rule.gate;
  float logit = largest * gate[0] + entropy * gate[1];
  logit = logit + margin * gate[2];
  logit = logit + entropy_of_squares * gate[3];
  const float share = sigmoid_of(logit + gate[4]);
  if (!(rule.flags & kExitIndependent)) {
    const float confidence = *mass + share * limits[1];
    *mass = *mass + share;
    return confidence;
  }
  const float left = 1.0f - *mass, ratio = share / left;
  const float hazard = ratio > 1.0f ? 1.0f : ratio;
  *mass = 1.0f - left * (1.0f - hazard);
  return hazard * (0.5f * limits[1]);
}

// z: the logits, all finite, then -inf up to a whole step of a sum.
float confidence_of(const ExitArgs& args, int64_t n, const float* z, float learned) {
  const ExitCriterion criterion = args.rule.criterion();
  float* state = args.state + 3 * n;
  const int64_t end = padded(args.classes);
  BestTwo best;
  for (int64_t c = 0; c < end; c += kWidth) best.take(at(z + c));
  best.fold();
  const float largest = best.high[0];
  switch (criterion) {
    case ExitCriterion::kLearned:
      return sigmoid_of(learned);
    case ExitCriterion::kMaxLogit:
      return largest;
    case ExitCriterion::kPatience: {
      const float named = float(std::find(z, z + args.classes, largest) - z + 1);
      state[1] = named == state[2] ? state[1] + 1.0f : 0.0f;
      state[2] = named;
      return state[1];
    }
    default:
      break;
  }
  const auto [total, entropy] = softmax_of(z, end, largest, 1.0f);
  if (criterion == ExitCriterion::kEntropy) return -entropy;
  const float probability = 1.0f / total;
  if (criterion == ExitCriterion::kMaxProb) return probability;
  const float second = std::max(best.low[0] - largest, kLowest);
  const float margin = (1.0f - unfused_exp(all(second))[0]) / total;
  if (criterion == ExitCriterion::kMargin) return margin;
  return jei_dnn(args.rule, args.limits + 2 * n, state, probability, entropy, margin,
                 softmax_of(z, end, largest, 2.0f).entropy);
}

// Reads the outputs of row n; writes its logits, total, state and confidence; z is scratch.
void judge(const ExitArgs& args, int64_t n, const float* outputs, float* z) {
  const int64_t classes = args.classes;
  const bool scored = args.rule.criterion() == ExitCriterion::kLearned;
  const float learned = scored ? outputs[classes] : 0.0f;
  float* total = args.total ? args.total + n * classes : nullptr;
  float* logits = args.logits ? args.logits + n * classes : nullptr;
  bool finite = std::abs(learned) <= FLT_MAX;
  for (int64_t c = 0; c < classes; ++c) {
    float value = outputs[c];
    if (total) total[c] = value = total[c] + value;
    if (logits) logits[c] = value;
    z[c] = value;
    finite &= std::abs(value) <= FLT_MAX;
  }
  float* state = args.state + 3 * n;
  if (finite) {
    args.confidence[n] = confidence_of(args, n, z, learned);
    return;
  }
  args.confidence[n] = std::numeric_limits<float>::quiet_NaN();
  if (args.rule.criterion() == ExitCriterion::kPatience) state[1] = state[2] = 0.0f;
}

}  // namespace

int64_t plan_exit(const ExitArgs& args) {
  const int64_t count = args.count, outputs = args.head.weight ? args.head.outputs : args.classes;
  for (int64_t n = 0; args.class_rows && n < count; ++n)
    if (args.class_rows[n] < 0 || args.class_rows[n] >= args.x_rows) return -1 - n;
  const float* from = static_cast<const float*>(args.x);
  if (args.head.weight) {
    static thread_local Scratch scratch;
    float* x = scratch.take<float>(count * (args.head.width + outputs));
    float* to = outputs == args.classes ? args.logits : x + count * args.head.width;
    run_head(args, x, to);
    from = to;
  }
#pragma omp parallel if (count > 1 && count * args.classes >= kParallelLogits)
  {
    static thread_local Scratch scratch;
    const int64_t end = padded(args.classes);
    float* z = scratch.take<float>(end);
    std::fill(z + args.classes, z + end, kNever);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; ++n) judge(args, n, from + n * outputs, z);
  }
  const bool strict = args.rule.flags & kExitStrict;
  int32_t kept = 0;
  for (int64_t n = 0; n < count; ++n) {
    const float confidence = args.confidence[n], threshold = args.limits[2 * n];
    const bool leaves = strict ? confidence > threshold : confidence >= threshold;
    args.rows[kept] = int32_t(n);
    args.inverse[n] = leaves ? -1 : kept;
    kept += !leaves;
  }
  args.offsets[0] = 0;
  args.offsets[1] = kept;
  return kept;
}

}  // namespace pyrt::PYRT_ISA
