// combine: out[n] += sum over choices k of weights[p] * channel[n] * packed[p], p = inverse[n, k],
// the way back of packed results. Choices are added in order to the float32 value of out, multiply
// and add rounded separately, so that the result has the bits of the CPU and of the reference.
// A gather from the packed side: no atomics, rows are owned.
//
// Bytes moved: R * H read + touched rows of out read and written (+ R weights, + 4 H per touched
// row of channel weights). Rows without a kept choice are not touched. Limit: HBM bandwidth.
#include "common.cuh"

namespace pyrt {

// Block (columns, rows); weights and channel may be null (1).
template <typename T, int V>
__device__ void combine_rows(const T* __restrict__ packed, const int* __restrict__ inverse,
                             const float* __restrict__ weights, const float* __restrict__ channel,
                             T* __restrict__ out, i64 width, int num_rows, int choices) {
  const int n = blockIdx.x * blockDim.y + threadIdx.y;
  if (n >= num_rows) return;
  const int* positions = inverse + i64(n) * choices;
  bool touched = false;
  for (int k = 0; k < choices; ++k) touched |= positions[k] >= 0;
  if (!touched) return;
  T* row = out + n * width;
  for (i64 h = threadIdx.x * V; h < width; h += blockDim.x * V) {
    float total[V], scale[V];
    load<V>(row + h, total);
    if (channel) load<V>(channel + n * width + h, scale);
#pragma unroll 2
    for (int k = 0; k < choices; ++k) {
      const int position = positions[k];
      if (position < 0) continue;
      const float weight = weights ? weights[position] : 1.0f;
      float value[V];
      load<V>(packed + position * width + h, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float term = __fmul_rn(value[i], weight);
        if (channel) term = __fmul_rn(term, scale[i]);
        total[i] = __fadd_rn(total[i], term);
      }
    }
    store<V>(row + h, total);
  }
}

// _v8 needs a width that is a multiple of 8 and 16-byte aligned pointers; _v1 takes any.
#define PYRT_COMBINE(name, T, V)                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                         \
      name(const T* packed, const int* inverse, const float* weights, const float* channel, \
           T* out, i64 width, int num_rows, int choices) {                                  \
    combine_rows<T, V>(packed, inverse, weights, channel, out, width, num_rows, choices);   \
  }

PYRT_COMBINE(combine_bf16_v8, bf16, 8)
PYRT_COMBINE(combine_bf16_v1, bf16, 1)
PYRT_COMBINE(combine_f32_v8, float, 8)
PYRT_COMBINE(combine_f32_v1, float, 1)

}  // namespace pyrt
