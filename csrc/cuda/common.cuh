// Device helpers shared by every kernel. Includes no header of CUDA, so that nvcc and NVRTC (which
// has none where no toolkit is installed) compile the same text.
#pragma once

#include "ptx.cuh"

namespace pyrt {

using i64 = long long;

constexpr int kWarp = 32;
constexpr u32 kAllLanes = 0xffffffffu;

// Storage only; arithmetic is float32.
struct bf16 {
  unsigned short bits;
};

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }
__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ inline float never() { return __uint_as_float(0xff800000u); }  // -infinity

// ---- bf16 <-> float32 ----

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(bf16* to, float value) {
  to->bits = static_cast<unsigned short>(pack_bf16(value, 0.0f));
}

// ---- V consecutive elements as float32; V == 8 needs 16-byte alignment ----

template <int V, typename T>
__device__ inline void load(const T* from, float (&to)[V]) {
  static_assert(V == 1, "only 1 and 8 elements");
  to[0] = to_float(*from);
}

template <>
__device__ inline void load<8, bf16>(const bf16* from, float (&to)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <>
__device__ inline void load<8, float>(const float* from, float (&to)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

template <int V, typename T>
__device__ inline void store(T* to, const float (&from)[V]) {
  static_assert(V == 1, "only 1 and 8 elements");
  store(to, from[0]);
}

template <>
__device__ inline void store<8, bf16>(bf16* to, const float (&from)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                 pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

template <>
__device__ inline void store<8, float>(float* to, const float (&from)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

__device__ inline float gelu(float value) {
  return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
}

// ---- sums and scans ----

__device__ inline float warp_sum(float value) {  // halves fold, as everywhere
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

__device__ inline int warp_inclusive_scan(int value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += other;
  }
  return value;
}

// Sum of `value` over lower threads of the block; `total` is the sum over all. Every thread of a
// one-dimensional block of whole warps takes part.
__device__ inline int block_exclusive_scan(int value, int* total) {
  __shared__ int sums[kWarp];
  const int inclusive = warp_inclusive_scan(value);
  __syncthreads();  // an earlier call may still be reading sums
  if (lane_id() == kWarp - 1) sums[warp_id()] = inclusive;
  __syncthreads();
  if (warp_id() == 0) {
    const int warps = blockDim.x / kWarp;
    sums[lane_id()] = warp_inclusive_scan(lane_id() < warps ? sums[lane_id()] : 0);
  }
  __syncthreads();
  *total = sums[kWarp - 1];
  return inclusive - value + (warp_id() > 0 ? sums[warp_id() - 1] : 0);
}

}  // namespace pyrt
