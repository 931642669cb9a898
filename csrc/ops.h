// Every native CPU op, documented once. Sizes are elements, pointers never alias unless said, every
// count may be zero (then nothing is read or written). Rows are contiguous.
#pragma once

#include <string>

#include "core/plan.h"

namespace pyrt {

// The last two are of a pair of matrices, gate and up, whose panels are interleaved.
enum class Epilogue : int {
  kNone = 0,
  kGelu = 1,
  kSilu = 2,
  kRelu = 3,
  kSiluMul = 4,
  kSwigluOai = 5,
};

// ---- planners: float32 scores to a Plan; one pass, same bits as pyruntime/ops/reference.py ----

// Keeps row n unless scores[n] <= tau[n * tau_stride] (so NaN runs). Writes rows [N], offsets [2],
// inverse [N] and, unless null, weights [N]: the score of every kept row. Returns R.
int64_t plan_threshold(const float* scores, const float* tau, int64_t tau_stride, int64_t n,
                       int32_t* rows, int32_t* offsets, int32_t* inverse, float* weights);

enum class Score : int { kNone = 0, kSoftmax = 1, kSigmoid = 2, kSqrtSoftplus = 3 };

// pyruntime/ops/topk.py; flags are Score, then a bit for each kTopK... below.
constexpr int kTopKOverChosen = 4, kTopKNormalize = 8, kTopKSum2 = 16, kTopKRoundWeights = 32,
              kTopKRenormalizeUsed = 64;
struct TopKRule {
  int64_t k;
  int flags;
  int64_t groups, top_groups;
  float epsilon, scale;
};

struct TopKArgs {
  const float* logits;  // [N, E]
  const float* bias;    // [E] or null, for the choice alone
  const float* limits;  // [N, 3] or null: slots, gap, mass
  TopKRule rule;
  int32_t* ids;    // [N, k] best first, then -1
  float* weights;  // [N, k], unspecified where the id is -1; plan_topk brings its own
  int64_t rows, experts;
};

// Choices by args.rule and their plan. args.ids become inverse [N, k]. Writes rows [R], offsets
// [E+1] and weights [R]; rows and weights have room for N*k. Returns R.
int64_t plan_topk(const TopKArgs& args, int32_t* rows, int32_t* offsets, float* weights);

// Stable counting sort of labels [N, K] in [0, S); -1 is dropped. slot_weights [N, K] and weights
// [R] are both null or neither. inverse [N, K] may be labels. Returns R, or -1 - f for the first
// flat f whose label is out of range.
int64_t plan_partition(const int32_t* labels, const float* slot_weights, int64_t n, int64_t choices,
                       int64_t segments, int32_t* rows, int32_t* offsets, float* weights,
                       int32_t* inverse);

// Linearly interpolated quantile of n >= 1 scores, NaN above all; scratch [n] is overwritten.
float quantile(const float* scores, int64_t n, double q, float* scratch);

// ---- movement ----

// out[r] = x[rows[r]] for rows of row_bytes bytes.
void gather(const void* x, const int32_t* rows, int64_t kept, int64_t row_bytes, void* out);

// In place: x[r] = x[rows[r]] for ascending rows (so rows[r] >= r and nothing is read after it was
// overwritten).
void compact(void* x, const int32_t* rows, int64_t kept, int64_t row_bytes);

struct CombineArgs {
  const void* packed;            // [R, H]
  PlanView plan;                 // weights multiply whole rows
  const float* channel_weights;  // [N, H] or null, multiplies element by element
  void* out;                     // [N, H], out[n] += sum over choices in order; float32 accumulate
  int64_t width;                 // H
  DType dtype;                   // of packed and out
};

// ---- compute ----

struct MatmulArgs {
  const void* x;         // [*, K]: packed rows, or source rows when plan.rows is given
  const void* weight;    // panel layout (pyruntime/ops/weight.py) of S matrices [N, K]
  const float* scale;    // [S, N] of int8 weights: W = q * scale; |q| <= 127
  const float* bias;     // [S, N] or null
  void* out;             // [R, N], or [R, N/2] for a pair; not x
  PlanView plan;         // offsets null: one segment of `kept` rows
  int64_t in_features;   // K
  int64_t out_features;  // N
  DType dtype;           // of x
  DType weight_dtype;    // x's, or int8 in the panels of bf16
  DType out_dtype;
  Epilogue epilogue;
  float alpha, limit;  // of kSwigluOai
  bool accumulate;     // out += the result, added in float32 and rounded once

  bool pair() const { return epilogue >= Epilogue::kSiluMul; }
  int64_t columns() const { return pair() ? out_features / 2 : out_features; }  // of out
};

struct NormArgs {
  const void* x;          // [N, H], or [*, H] with source
  const int32_t* source;  // [N] or null: out[n] is of x[source[n]]
  const float* weight;    // [H]
  const float* bias;      // [H]: layer_norm only
  void* out;              // [N, H]; out may be x if their dtypes agree and source is null
  // [H] or null, rms_norm only: probe_out[n] = sigmoid(dot(out[n], probe) + probe_bias), of the
  // rounded row
  const float* probe;
  float probe_bias;
  float* probe_out;  // [N]
  int64_t rows, width;
  float eps;
  DType dtype, out_dtype;
  bool gelu;  // of the result, before it is rounded: layer_norm only
};

// Patches of images as rows: out[(b, i, j)][(c, y, x)] = x[b][c][i * stride - padding + y][...], 0
// outside of the image.
struct PatchArgs {
  const void* x;  // [B, C, H, W], or [B, H, W, C] if channels_last
  void* out;      // [B * down * across, C * size * size]
  int64_t images, channels, height, width, size, stride, padding;
  bool channels_last;
  DType dtype, out_dtype;

  int64_t down() const { return (height + 2 * padding - size) / stride + 1; }
  int64_t across() const { return (width + 2 * padding - size) / stride + 1; }
};

// R squares of images of any sizes, each shrunk to size x size pixels: a patch, laid out (c, y, x).
// What lies outside of an image is 0.
struct SquaresView {
  const float* pixels;
  const int64_t* table;   // [B, 3]: first element of [C, H, W], H, W
  const int32_t* places;  // [R, 4]: image, top, left, ratio >= 1; the side is ratio * size
  int64_t elements, images, channels, rows, size;
  bool bilinear;  // mean of the middle 2 x 2 or 1 x 1 pixels of a ratio x ratio block, not of all

  int64_t width() const { return channels * size * size; }  // of a patch
};

constexpr int64_t kMaxRatio = 256;

// Why the squares must not be read: an image that exceeds the pixels, a place without an image or
// with a bad ratio. "" if they may.
std::string problem(const SquaresView& squares);
// The first of rows [count] that is not in [0, end), or "".
std::string problem(const char* name, const int32_t* rows, int64_t count, int64_t end);

struct GatherPatchArgs {
  SquaresView squares;
  void* out;  // [R, C * size * size]
  DType out_dtype;
};

// out[out_rows[r]] = epilogue(W patch(r) + bias + positions[position_rows[r]]); patches are rounded
// to the weight's dtype, sums are float32.
struct EmbedArgs {
  SquaresView squares;
  const void* weight;            // panels of one matrix [D, C * size * size]
  const float* bias;             // [D] or null
  const float* positions;        // [*, D] or null
  const int32_t* position_rows;  // [R] with positions
  void* out;                     // [*, D]
  const int32_t* out_rows;       // [R], distinct, or null for the identity
  int64_t columns;               // D
  DType weight_dtype, out_dtype;
  Epilogue epilogue;  // kNone or kGelu
};

// In place on x [N, H] float32: sigmoid; mean[n] = average of the row.
struct GateArgs {
  float* x;
  float* mean;
  int64_t rows, width;
};

// Rotary embedding (half-split form) of a paged cache's new keys, and storage of keys and values.
// Cache layouts, 32 tokens a block, are those of the matmul panels: attention is two matmuls.
//   keys   bf16 [blocks, heads, D/2, 32, 2]   f32 [blocks, heads, D, 32]
//   values bf16 [blocks, heads, D/32, 16, 32, 2]   f32 [blocks, heads, D/32, 32, 32]
// with D padded to a multiple of 32 (kHeadPad) in both.
struct AppendArgs {
  const void* kv;            // [N, 2 * heads * D]: keys, then values
  const float* cos_sin;      // [positions, D]: D/2 cosines, D/2 sines
  const float* key_norm;     // [D] or null: RMS norm of every key head first
  const int32_t* positions;  // [N]
  const int32_t* slots;      // [N]: block * 32 + offset
  void* keys;
  void* values;
  int64_t rows, heads, head_dim;
  float eps;
  DType dtype;
};

// In place on q [R, heads * D]: optional RMS norm, then rotary embedding at positions[rows[r]].
struct RotateArgs {
  void* q;
  const float* cos_sin;
  const float* norm;         // [D] or null
  const int32_t* positions;  // [N]
  const int32_t* rows;       // [R] or null for the identity
  int64_t kept, heads, head_dim;
  float eps;
  DType dtype;
};

struct AttentionArgs {
  const void* q;                // [R, heads * D]
  const int32_t* rows;          // [R] or null
  const int32_t* positions;     // [N] the token sees cache entries 0 .. position, see window
  const int32_t* sequences;     // [N] row of block_tables; rows of one sequence are contiguous
  const int32_t* block_tables;  // [B, max_blocks]
  const void* keys;
  const void* values;
  const float* sinks;  // [heads] or null: a logit that joins the denominator of the softmax only
  void* out;           // [R, heads * D]
  int64_t kept, heads, kv_heads, head_dim, max_blocks;
  int64_t window;  // a token sees the last `window` of its entries; 0: all of them
  float scale;
  DType dtype;
};

// Attention inside ragged sequences of rows: a query sees all keys of its sequence and no others.
// Sequences have as many queries and keys as they like; one without keys answers zeros.
struct VarlenArgs {
  const void* q;          // [Tq, heads * D], rows q_stride elements apart
  const void* k;          // [Tk, heads * D]
  const void* v;          // [Tk, heads * D]
  const int32_t* cu_q;    // [count + 1] from 0 to Tq, never falling
  const int32_t* cu_k;    // [count + 1] from 0 to Tk
  const float* key_bias;  // [Tk] or null: added to every score of the key
  void* out;              // [Tq, heads * D]
  int64_t count, heads, head_dim;
  int64_t q_stride, k_stride, v_stride;
  float scale;
  DType dtype;
};

constexpr int64_t kBlock = 32;    // tokens of one cache block
constexpr int64_t kHeadPad = 32;  // head_dim is padded to a multiple of this in the cache

// ---- early exit: pyruntime/ops/exit.py ----

enum class ExitCriterion : int {
  kJeiDnn = 0,
  kMaxProb = 1,
  kMaxLogit = 2,
  kEntropy = 3,
  kMargin = 4,
  kPatience = 5,
  kLearned = 6,
};
constexpr int kExitStrict = 8, kExitIndependent = 16;  // beside the criterion in flags

struct ExitRule {
  int flags;
  float gate[5];  // of kJeiDnn: four weights and the bias

  ExitCriterion criterion() const { return ExitCriterion(flags & 7); }
};

struct ExitHead {
  const float* weight;       // panels of one matrix [N, D]; null: x is the logits
  const float* bias;         // [N] or null
  const float* norm_weight;  // [D] or null: no norm
  const float* norm_bias;    // [D]
  float eps;
  int64_t outputs, width;  // N, which is C, or C + 1 of kLearned; D
};

struct ExitArgs {
  const void* x;              // [T, D]; without a head float32 [n, C]
  const int32_t* class_rows;  // [n] or null for the identity
  ExitHead head;
  ExitRule rule;
  float* state;         // [n, 3]: mass or 1 - P, patience counter, 1 + class named before
  const float* limits;  // [n, 2]: threshold, 1 / tau
  float* total;         // [n, C] or null: added to the logits, then set to them
  float* logits;        // [n, C]; null without head and total
  float* confidence;    // [n]
  int32_t* rows;        // [n] room for those that continue
  int32_t* offsets;     // [2]
  int32_t* inverse;     // [n]
  int64_t count, classes, x_rows;  // n, C, T
  DType dtype;                     // of x
};

// The ops that are compiled once per instruction set.
struct Kernels {
  const char* isa;
  void (*choose_topk)(const TopKArgs&);  // the first half of plan_topk: ids and their weights
  void (*combine)(const CombineArgs&);
  void (*segment_matmul)(const MatmulArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*layer_norm)(const NormArgs&);
  void (*patches)(const PatchArgs&);
  void (*gather_patches)(const GatherPatchArgs&);
  void (*embed_patches)(const EmbedArgs&);
  void (*gate)(const GateArgs&);
  void (*append)(const AppendArgs&);
  void (*rotate)(const RotateArgs&);
  void (*attention)(const AttentionArgs&);
  // Returns how many rows continue, or -1 - n for the first class row that x does not have.
  int64_t (*plan_exit)(const ExitArgs&);
  void (*attention_varlen)(const VarlenArgs&);
};

// The widest set this processor has, or the one PYRUNTIME_CPU_ISA names (portable, avx2, avx512,
// avx512_bf16). Read once; throws std::invalid_argument for an unknown or unsupported name.
const Kernels& kernels();

}  // namespace pyrt
