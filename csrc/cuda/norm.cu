// layer_norm: out[n] = (x[r] - mean) / sqrt(variance + eps) * weight + bias of row r = rows[n], or
// n, in float32, rounded once; optionally its exact GELU. A warp per row, which it reads three
// times: once from HBM, then from L1. A negative r leaves its row of out as it was.
//
// Bytes moved: N * H read + N * H written. Limit: HBM bandwidth.
// Lanes take the same columns and add in the same order in both forms: a row has the same bits
// wherever it lies.
#include "common.cuh"

namespace pyrt {

struct LayerNorm {
  const void* x;        // [*, H]
  const int* rows;      // [N] or null
  const float* weight;  // [H]
  const float* bias;    // [H]
  void* out;            // [N, H]
  i64 width;            // H
  int count;            // N
  int activate;         // GELU
  int out_float;        // out is float32, else bf16
  float eps;
};

constexpr int kNormItems = 8;  // columns that a lane takes at a time

// Columns column .. column + 7 of a row, zero past its end.
template <int V, typename T>
__device__ inline void load_items(const T* row, i64 column, i64 width, float (&to)[kNormItems]) {
  if constexpr (V == kNormItems) {
    load<V>(row + column, to);
  } else {
#pragma unroll
    for (int i = 0; i < kNormItems; ++i) to[i] = column + i < width ? to_float(row[column + i]) : 0;
  }
}

// _v8 needs a width that is a multiple of 8 and 16-byte aligned pointers; _v1 takes any.
template <typename T, int V>
__device__ void normalise(const LayerNorm& a) {
  const int n = blockIdx.x * (blockDim.x / kWarp) + warp_id();
  if (n >= a.count) return;
  const int source = a.rows ? a.rows[n] : n;
  if (source < 0) return;
  const T* row = static_cast<const T*>(a.x) + source * a.width;
  const i64 first = lane_id() * kNormItems, step = kWarp * kNormItems;
  float value[kNormItems];

  float total = 0.0f;
  for (i64 h = first; h < a.width; h += step) {
    load_items<V>(row, h, a.width, value);
#pragma unroll
    for (int i = 0; i < kNormItems; ++i) total += value[i];
  }
  const float mean = warp_sum(total) / a.width;
  float squares = 0.0f;
  for (i64 h = first; h < a.width; h += step) {
    load_items<V>(row, h, a.width, value);
#pragma unroll
    for (int i = 0; i < kNormItems; ++i) {
      const float away = V == 1 && h + i >= a.width ? 0.0f : value[i] - mean;
      squares += away * away;
    }
  }
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(squares) / a.width + a.eps));

  for (i64 h = first; h < a.width; h += step) {
    float weight[kNormItems], bias[kNormItems];
    load_items<V>(row, h, a.width, value);
    load_items<V>(a.weight, h, a.width, weight);
    load_items<V>(a.bias, h, a.width, bias);
#pragma unroll
    for (int i = 0; i < kNormItems; ++i) {
      value[i] = (value[i] - mean) * scale * weight[i] + bias[i];
      if (a.activate) value[i] = gelu(value[i]);
    }
    const i64 at = n * a.width + h;
    if constexpr (V == kNormItems) {
      a.out_float ? store<V>(static_cast<float*>(a.out) + at, value)
                  : store<V>(static_cast<bf16*>(a.out) + at, value);
    } else {
#pragma unroll
      for (int i = 0; i < kNormItems; ++i) {
        if (h + i >= a.width) continue;
        a.out_float ? store(static_cast<float*>(a.out) + at + i, value[i])
                    : store(static_cast<bf16*>(a.out) + at + i, value[i]);
      }
    }
  }
}

#define PYRT_LAYER_NORM(name, T, V) \
  extern "C" __global__ void __launch_bounds__(256) name(LayerNorm a) { normalise<T, V>(a); }

PYRT_LAYER_NORM(layer_norm_bf16_v8, bf16, 8)
PYRT_LAYER_NORM(layer_norm_bf16_v1, bf16, 1)
PYRT_LAYER_NORM(layer_norm_f32_v8, float, 8)
PYRT_LAYER_NORM(layer_norm_f32_v1, float, 1)

}  // namespace pyrt
