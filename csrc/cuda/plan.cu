// Planners: gate scores or labels to a Plan (pyruntime/plan.py) that never leaves the device.
//
// A plan is a stable counting sort of N*K choices by segment. Determinism without atomics: a warp
// owns kChunk consecutive choices and walks them in order; __match_any_sync ranks the 32 choices of
// one step, and a histogram per warp in shared memory carries the count from step to step.
//   N*K <= warps * kChunk: one block, one launch (plan_*_small)
//   otherwise, one tile of warps * kChunk choices per block: *_count, plan_scan, *_scatter
// Shared memory: warps * S * 4 bytes; the host picks warps so that it stays below 48 KB.
//
// Bytes moved: 4 N (E for top-k) scores + 12 N*K written: microseconds, so the limit is latency:
// one launch (2-4 us) for the small form, three for the other.
//
// Every planner fills rows[R..] with -1 and weights[R..] with 0, so that equal inputs give equal
// bits.
#include "common.cuh"
#include "topk.cuh"

namespace pyrt {

constexpr int kItems = 8;               // choices per lane
constexpr int kChunk = kWarp * kItems;  // choices per warp
constexpr int kDropped = -1;

struct Threshold {  // !(score <= tau) and not score > tau: a NaN score runs
  const float* scores;
  const float* tau;
  int tau_stride;  // 0: one tau for all
  __device__ int operator()(int i) const {
    return scores[i] <= tau[i64(i) * tau_stride] ? kDropped : 0;
  }
};

struct Labels {  // a label outside [0, S) is dropped
  const int* labels;
  int segments;
  __device__ int operator()(int i) const {
    return u32(labels[i]) < u32(segments) ? labels[i] : kDropped;
  }
};

// Where a plan is written. weights and choice_weights are both null or neither.
struct PlanOut {
  int* rows;                    // [N*K]
  int* offsets;                 // [S+1]
  float* weights;               // [N*K] by packed position
  int* inverse;                 // [N, K]
  const float* choice_weights;  // [N, K]
  int choices;                  // K
};

extern __shared__ int histograms[];  // [warps][S]; after the scan, write cursors

// First choice of this thread's lane: its choices are first + i * kWarp.
__device__ inline int first_choice() {
  return (blockIdx.x * (blockDim.x / kWarp) + warp_id()) * kChunk + lane_id();
}

template <typename Source>
__device__ void load_segments(const Source& source, int total, int (&segment)[kItems]) {
  const int first = first_choice();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int choice = first + i * kWarp;
    segment[i] = choice < total ? source(choice) : kDropped;
  }
}

// Leaves the warp's histogram in histograms[warp].
__device__ inline void count_segments(const int (&segment)[kItems], int segments) {
  const int size = blockDim.x / kWarp * segments;
  for (int i = threadIdx.x; i < size; i += blockDim.x) histograms[i] = 0;
  __syncthreads();
  int* counts = histograms + warp_id() * segments;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const u32 peers = __match_any_sync(kAllLanes, segment[i]);
    if (segment[i] >= 0 && lane_id() == __ffs(peers) - 1) counts[segment[i]] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
}

// Exclusive scan over the warps of histograms[.][s]; returns the sum.
__device__ inline int scan_warps(int s, int segments) {
  int sum = 0;
  for (int i = s; i < static_cast<int>(blockDim.x / kWarp) * segments; i += segments) {
    const int count = histograms[i];
    histograms[i] = sum;
    sum += count;
  }
  return sum;
}

__device__ inline void add_start(int s, int segments, int start) {
  for (int i = s; i < static_cast<int>(blockDim.x / kWarp) * segments; i += segments)
    histograms[i] += start;
}

// Writes rows, weights and inverse of this thread's choices; `kept` is R.
__device__ inline void scatter(const int (&segment)[kItems], int total, int segments, int kept,
                               const PlanOut& out) {
  int* cursors = histograms + warp_id() * segments;
  const int first = first_choice();
  const u32 lower = (1u << lane_id()) - 1;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int choice = first + i * kWarp;
    const u32 peers = __match_any_sync(kAllLanes, segment[i]);
    int position = kDropped;
    if (segment[i] >= 0) position = cursors[segment[i]] + __popc(peers & lower);
    __syncwarp();  // all have read the cursor before its leader moves it
    if (segment[i] >= 0 && lane_id() == __ffs(peers) - 1) cursors[segment[i]] += __popc(peers);
    __syncwarp();
    if (choice >= total) continue;
    out.inverse[choice] = position;
    if (position >= 0) {
      out.rows[position] = choice / out.choices;
      if (out.weights) out.weights[position] = out.choice_weights[choice];
    }
    if (choice >= kept) {  // padding beyond R: no packed row lives there
      out.rows[choice] = kDropped;
      if (out.weights) out.weights[choice] = 0.0f;
    }
  }
}

// The whole plan in one block.
template <typename Source>
__device__ void plan_small(const Source& source, int total, int segments, const PlanOut& out) {
  int segment[kItems];
  load_segments(source, total, segment);
  count_segments(segment, segments);
  int kept = 0;
  for (int first = 0; first < segments; first += blockDim.x) {
    const int s = first + threadIdx.x;
    const int count = s < segments ? scan_warps(s, segments) : 0;
    int sum;
    const int start = kept + block_exclusive_scan(count, &sum);
    if (s < segments) {
      add_start(s, segments, start);
      out.offsets[s] = start;
    }
    kept += sum;
  }
  if (threadIdx.x == 0) out.offsets[segments] = kept;
  __syncthreads();
  scatter(segment, total, segments, kept, out);
}

// counts [S][tiles]: choices of this tile in each segment.
template <typename Source>
__device__ void count_tile(const Source& source, int total, int segments, int* counts) {
  int segment[kItems];
  load_segments(source, total, segment);
  count_segments(segment, segments);
  for (int s = threadIdx.x; s < segments; s += blockDim.x)
    counts[i64(s) * gridDim.x + blockIdx.x] = scan_warps(s, segments);
}

// starts [S][tiles]: packed position of the tile's first choice in each segment.
template <typename Source>
__device__ void scatter_tile(const Source& source, int total, int segments, const int* starts,
                             const PlanOut& out) {
  int segment[kItems];
  load_segments(source, total, segment);
  count_segments(segment, segments);
  for (int s = threadIdx.x; s < segments; s += blockDim.x) {
    scan_warps(s, segments);
    add_start(s, segments, starts[i64(s) * gridDim.x + blockIdx.x]);
  }
  __syncthreads();
  scatter(segment, total, segments, out.offsets[segments], out);
}

// ---- threshold: S = 1, K = 1 ----

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_threshold_small(Threshold source, PlanOut out, int total) {
  plan_small(source, total, 1, out);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_threshold_count(Threshold source, int* counts, int total) {
  count_tile(source, total, 1, counts);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_threshold_scatter(Threshold source, PlanOut out, const int* starts, int total) {
  scatter_tile(source, total, 1, starts, out);
}

// ---- labels: partition, and top-k once its choices are known ----

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_labels_small(Labels source, PlanOut out, int total) {
  plan_small(source, total, source.segments, out);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_labels_count(Labels source, int* counts, int total) {
  count_tile(source, total, source.segments, counts);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_labels_scatter(Labels source, PlanOut out, const int* starts, int total) {
  scatter_tile(source, total, source.segments, starts, out);
}

// One block: counts [S][tiles] become starts in place, offsets [S+1] their segment boundaries.
extern "C" __global__ void __launch_bounds__(1024, 1)
    plan_scan(int* counts, int* offsets, int tiles, int segments) {
  const int size = tiles * segments;
  int kept = 0;
  for (int first = 0; first < size; first += blockDim.x * kItems) {
    const int mine = first + threadIdx.x * kItems;
    int count[kItems], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      count[i] = mine + i < size ? counts[mine + i] : 0;
      sum += count[i];
    }
    int start = kept + block_exclusive_scan(sum, &total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (mine + i >= size) break;
      counts[mine + i] = start;
      if ((mine + i) % tiles == 0) offsets[(mine + i) / tiles] = start;
      start += count[i];
    }
    kept += total;
  }
  if (threadIdx.x == 0) offsets[segments] = kept;
}

// ---- top-k; the number at the end is how many experts a lane holds ----

// ids and weights [N, k]; a warp per row.
#define PYRT_CHOOSE(items)                                            \
  extern "C" __global__ void __launch_bounds__(256)                   \
      plan_topk_choose_##items(TopKIn in, int* ids, float* weights) { \
    choose_rows<items>(in, ids, weights);                             \
  }
PYRT_CHOOSE(2)
PYRT_CHOOSE(8)
PYRT_CHOOSE(32)

// Choice and plan in one block. ids and weights are scratch [N, k].
#define PYRT_SMALL(items)                                                             \
  extern "C" __global__ void __launch_bounds__(1024, 1)                               \
      plan_topk_small_##items(TopKIn in, int* ids, float* weights, PlanOut out) {     \
    choose_rows<items>(in, ids, weights);                                             \
    __syncthreads(); /* also orders the block's own global writes before its reads */ \
    plan_small(Labels{ids, in.experts}, in.num_rows* in.k, in.experts, out);          \
  }
PYRT_SMALL(2)
PYRT_SMALL(8)

}  // namespace pyrt
