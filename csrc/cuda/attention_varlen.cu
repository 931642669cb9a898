// attention_varlen: softmax(scale q k^T + key_bias) v inside ragged sequences of packed rows, every
// key seen by every query of its sequence. A sequence without keys answers zeros.
//   _mma_D         bf16, a head of at most D columns: tensor cores by mma.sync, weights rounded to
//                  bf16, the rest float32
//   _plain_*_D     float32, or bf16 that 16-byte loads cannot take: FMA, all of it float32
//
// A block has up to block_rows query rows of one sequence and head. It takes them a few at a time
// through all keys, with the softmax of the keys seen so far (Dao et al. 2022, FlashAttention).
// _mma: as many keys as the slots of shared memory hold are read once for all its rows, so a block
// with block_rows of 256 is a whole head of an image of up to 256 tokens; more go round a ring.
//
// Bytes moved: q, k, v read and out written; k and v again (from L2) for every block_rows queries,
// or every 64 where they do not fit. FLOPs: 4 D per query and key, and one exp2. Limits: tensor
// cores by mma.sync (60-65 % of wgmma's peak on sm_90) for hundreds of keys; HBM for tens.
//
// A row's sums run over its own keys in rising order, 64 (32) at a time from the first of its
// sequence: its bits depend on no other row and on no cut of the work.
#include "common.cuh"

namespace pyrt {

struct Varlen {
  const void* q;          // [Tq, heads * D], rows q_stride elements apart
  const void* k;          // [Tk, heads * D]
  const void* v;          // [Tk, heads * D]
  const int* cu_q;        // [count + 1] from 0 to at most Tq, never falling
  const int* cu_k;        // [count + 1]
  const float* key_bias;  // [Tk] or null
  void* out;              // [Tq, heads * D], contiguous
  i64 q_stride, k_stride, v_stride;
  int count, heads, head_dim, block_rows;
  float scale;
};

// What a block works on: query rows first .. last - 1, and the keys they see.
struct Asked {
  int first, last, key, keys;
};

// Sequence i owns the slots from cu_q[i] / block_rows + i on, which are never fewer than the tiles
// it is cut into: no block has to add up the lengths of those before. Every warp looks by itself.
__device__ inline Asked find_rows(const Varlen& a, int slot) {
  int sequence = 0;
  for (int size = a.count; size > 1;) {  // the last one whose first slot is not above this
    const int step = ceil_div(size, kWarp);
    const int skip = lane_id() * step;
    const bool begun =
        skip < size && a.cu_q[sequence + skip] / a.block_rows + sequence + skip <= slot;
    const int skipped = (__popc(__ballot_sync(kAllLanes, begun)) - 1) * step;
    sequence += skipped;
    size = min(step, size - skipped);
  }
  const int begin = a.cu_q[sequence], end = a.cu_q[sequence + 1], key = a.cu_k[sequence];
  const int first = begin + (slot - begin / a.block_rows - sequence) * a.block_rows;
  return {first, min(end, first + a.block_rows), key, a.cu_k[sequence + 1] - key};
}

// fmaxf passes over a NaN; it reaches the sums as a weight.
__device__ inline float quad_max(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

__device__ inline float quad_sum(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// ---- tensor cores ----

constexpr int kSlotKeys = 64;   // keys of one slot of shared memory
constexpr int kRoundRows = 64;  // query rows of a block at a time: 16 of each of its four warps
constexpr float kLog2E = 1.44269504f;

// Byte offset of 16 bytes of a row. The exclusive or spreads the eight rows that ldmatrix reads
// together over all banks.
template <int kDim>
__device__ inline u32 head_offset(int row, int chunk) {
  return row * (2 * kDim) + (chunk ^ (kDim % 64 == 0 ? row % 8 : row / 2 % 4)) * 16;
}

// Turns the scores of 16 rows and the keys of a slot into weights 2^(score - largest). `factor` is
// what the sums so far are to be multiplied by. Index 0 is of row g, 1 of row g + 8.
__device__ inline void weigh(float (&s)[8][4], float (&largest)[2], float (&total)[2],
                             float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = largest[half];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) top = fmaxf(top, s[n][e]);
    }
    top = quad_max(top);
    const float base = top == never() ? 0.0f : top;  // every key so far is hidden
    factor[half] = fast_exp2(largest[half] - base);
    largest[half] = top;
    total[half] *= factor[half];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = fast_exp2(s[n][e] - base);
        total[half] += s[n][e];
      }
    }
  }
}

// 128 threads, kSlots * 256 * kDim bytes of shared memory.
template <int kDim, int kSlots>
__device__ void attend(const Varlen& a) {
  extern __shared__ __align__(128) unsigned char slots[];
  constexpr int kChunks = kDim / 8, kThreads = 128;
  constexpr int kKeyBytes = kSlotKeys * 2 * kDim;  // values follow

  const Asked asked = find_rows(a, blockIdx.x);
  if (asked.first >= asked.last) return;
  const i64 head = i64(blockIdx.y) * a.head_dim;
  const bf16* q = static_cast<const bf16*>(a.q) + head;
  const bf16* k = static_cast<const bf16*>(a.k) + asked.key * a.k_stride + head;
  const bf16* v = static_cast<const bf16*>(a.v) + asked.key * a.v_stride + head;

  const u32 base = shared_address(slots);
  const int blocks = ceil_div(asked.keys, kSlotKeys);
  const int rounds = ceil_div(asked.last - asked.first, kRoundRows);
  const bool resident = blocks <= kSlots;
  const int loads = resident ? blocks : rounds * blocks;
  auto fetch = [&](int load) {
    if (load < loads) {
      const u32 to = base + load % kSlots * 2 * kKeyBytes;
      const int from = load % blocks * kSlotKeys;
#pragma unroll 4
      for (int i = threadIdx.x; i < kSlotKeys * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool inside = from + row < asked.keys && chunk * 8 < a.head_dim;
        const i64 key = inside ? from + row : 0;
        const int column = inside ? chunk * 8 : 0;
        const u32 at = to + head_offset<kDim>(row, chunk);
        copy_async(at, k + key * a.k_stride + column, inside);
        copy_async(at + kKeyBytes, v + key * a.v_stride + column, inside);
      }
    }
    commit_copies();  // also when empty: the wait counts groups
  };
  for (int load = 0; load < kSlots - 1; ++load) fetch(load);

  const int lane = lane_id(), g = lane / 4, pair = lane % 4 * 2;
  const float scale = a.scale * kLog2E;
  for (int round = 0, load = 0; round < rounds; ++round) {
    const int row = asked.first + round * kRoundRows + warp_id() * 16;
    const bool working = row < asked.last;
    const bf16* low = q + min(row + g, asked.last - 1) * a.q_stride;  // past the end: the last
    const bf16* high = q + min(row + g + 8, asked.last - 1) * a.q_stride;
    u32 query[kDim / 16][4];
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * d + 8 * half + pair;
        const bool inside = column < a.head_dim;
        query[d][2 * half] = inside ? *reinterpret_cast<const u32*>(low + column) : 0;
        query[d][2 * half + 1] = inside ? *reinterpret_cast<const u32*>(high + column) : 0;
      }
    }
    float sum[kDim / 8][4] = {}, largest[2] = {never(), never()}, total[2] = {};

    for (int block = 0; block < blocks; ++block, ++load) {
      if (load < loads) {
        wait_copies<kSlots - 2>();
        __syncthreads();  // the slot is whole, and the one fetched next has been consumed by all
        fetch(load + kSlots - 1);
      }
      if (!working) continue;
      const u32 slot = base + (resident ? block : load % kSlots) * 2 * kKeyBytes;
      const int left = asked.keys - block * kSlotKeys;

      float s[8][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 keys
        if (16 * j >= left) continue;
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          u32 b[4];
          load_matrices(
              b, slot + head_offset<kDim>(16 * j + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
          mma(s[2 * j], query[d][0], query[d][1], query[d][2], query[d][3], b[0], b[1]);
          mma(s[2 * j + 1], query[d][0], query[d][1], query[d][2], query[d][3], b[2], b[3]);
        }
      }
      // Not fused with the difference from the largest: that of the largest must be 0.
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = __fmul_rn(s[n][e], scale);
      }
      if (a.key_bias || left < kSlotKeys) {
        const float* bias = a.key_bias ? a.key_bias + asked.key + block * kSlotKeys : nullptr;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = 8 * n + pair + e % 2;
            const float more = bias && key < left ? bias[key] * kLog2E : 0.0f;
            s[n][e] = key < left ? s[n][e] + more : never();
          }
        }
      }
      float factor[2];
      weigh(s, largest, total, factor);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[d][e] *= factor[e / 2];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (16 * j >= left) continue;
        const u32 w0 = pack_bf16(s[2 * j][0], s[2 * j][1]);
        const u32 w1 = pack_bf16(s[2 * j][2], s[2 * j][3]);
        const u32 w2 = pack_bf16(s[2 * j + 1][0], s[2 * j + 1][1]);
        const u32 w3 = pack_bf16(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          u32 b[4];
          load_matrices_transposed(
              b, slot + kKeyBytes + head_offset<kDim>(16 * j + lane % 16, 2 * d + lane / 16));
          mma(sum[2 * d], w0, w1, w2, w3, b[0], b[1]);
          mma(sum[2 * d + 1], w0, w1, w2, w3, b[2], b[3]);
        }
      }
    }

    if (!working) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = row + g + 8 * half;
      // 1 / 0 where every key was hidden: NaN, as of a softmax of nothing but -infinity.
      const float share = asked.keys > 0 ? 1.0f / quad_sum(total[half]) : 0.0f;
      if (to >= asked.last) continue;
      bf16* out = static_cast<bf16*>(a.out) + to * (i64(a.heads) * a.head_dim) + head;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        const int column = 8 * d + pair;
        if (column >= a.head_dim) continue;
        *reinterpret_cast<u32*>(out + column) =
            pack_bf16(sum[d][2 * half] * share, sum[d][2 * half + 1] * share);
      }
    }
  }
}

// ---- plain cores ----

// 128 threads: a warp has four query rows, a lane one key of 32 in the scores and kDim / 32 columns
// in the sums. Any head_dim up to kDim, any stride.
template <typename T, int kDim>
__device__ void attend_plain(const Varlen& a) {
  constexpr int kWarps = 4, kRows = 4, kColumns = kDim / kWarp;
  __shared__ float keys[kWarp][kDim + 1], values[kWarp][kDim];
  __shared__ __align__(16) float queries[kWarps][kDim][kRows], weights[kWarps][kWarp][kRows];

  const Asked asked = find_rows(a, blockIdx.x);
  const i64 head = i64(blockIdx.y) * a.head_dim;
  const T* q = static_cast<const T*>(a.q) + head;
  const T* k = static_cast<const T*>(a.k) + asked.key * a.k_stride + head;
  const T* v = static_cast<const T*>(a.v) + asked.key * a.v_stride + head;
  const int lane = lane_id(), warp = warp_id();

  for (int first = asked.first; first < asked.last; first += kWarps * kRows) {
    const int row = first + warp * kRows;
    __syncwarp();  // the queries of the rows before have been read
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* from = q + min(row + i, asked.last - 1) * a.q_stride;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane + kWarp * c;
        queries[warp][d][i] = d < a.head_dim ? to_float(from[d]) : 0.0f;
      }
    }
    float sum[kRows][kColumns] = {}, total[kRows] = {}, largest[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) largest[i] = never();

    for (int from = 0; from < asked.keys; from += kWarp) {
      const int left = min(kWarp, asked.keys - from);
      __syncthreads();  // the keys before have been used, the queries are there
      for (int i = threadIdx.x; i < kWarp * kDim; i += kWarps * kWarp) {
        const int key = i / kDim, d = i % kDim;
        const bool inside = key < left && d < a.head_dim;
        keys[key][d] = inside ? to_float(k[(from + key) * a.k_stride + d]) : 0.0f;
        values[key][d] = inside ? to_float(v[(from + key) * a.v_stride + d]) : 0.0f;
      }
      __syncthreads();
      if (row >= asked.last) continue;

      float score[kRows] = {};
#pragma unroll 4
      for (int d = 0; d < a.head_dim; ++d) {
        const float key = keys[lane][d];
#pragma unroll
        for (int i = 0; i < kRows; ++i) score[i] += key * queries[warp][d][i];
      }
      const bool seen = lane < left;
      const float bias = a.key_bias && seen ? a.key_bias[asked.key + from + lane] : 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        score[i] = seen ? score[i] * a.scale + bias : never();
        float top = largest[i] < score[i] ? score[i] : largest[i];
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
          const float other = __shfl_xor_sync(kAllLanes, top, step);
          top = other > top ? other : top;
        }
        const float base = top == never() ? 0.0f : top;  // every key so far is hidden
        const float factor = expf(largest[i] - base), weight = expf(score[i] - base);
        largest[i] = top;
        total[i] = total[i] * factor + weight;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[i][c] *= factor;
        weights[warp][lane][i] = weight;
      }
      __syncwarp();
#pragma unroll 4
      for (int key = 0; key < left; ++key) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float value = values[key][lane + kWarp * c];
#pragma unroll
          for (int i = 0; i < kRows; ++i) sum[i][c] += weights[warp][key][i] * value;
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float weight = warp_sum(total[i]);
      if (row + i >= asked.last) continue;
      T* out = static_cast<T*>(a.out) + (row + i) * (i64(a.heads) * a.head_dim) + head;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane + kWarp * c;
        if (d < a.head_dim) store(out + d, asked.keys > 0 ? sum[i][c] / weight : 0.0f);
      }
    }
  }
}

// Grid (Tq / block_rows + count, heads). The slots are what 96 KB hold, four at most; as many
// blocks as fit a multiprocessor's shared memory may have its registers.
#define PYRT_ATTEND(kDim, kSlots, kBlocks)                   \
  extern "C" __global__ void __launch_bounds__(128, kBlocks) \
      attention_varlen_mma_##kDim(Varlen a) {                \
    attend<kDim, kSlots>(a);                                 \
  }

PYRT_ATTEND(32, 4, 3)
PYRT_ATTEND(64, 4, 3)
PYRT_ATTEND(96, 4, 2)
PYRT_ATTEND(128, 3, 2)

#define PYRT_ATTEND_PLAIN(name, T, kDim)                 \
  extern "C" __global__ void __launch_bounds__(128)      \
      attention_varlen_plain_##name##_##kDim(Varlen a) { \
    attend_plain<T, kDim>(a);                            \
  }

PYRT_ATTEND_PLAIN(f32, float, 64)
PYRT_ATTEND_PLAIN(f32, float, 128)
PYRT_ATTEND_PLAIN(bf16, bf16, 64)
PYRT_ATTEND_PLAIN(bf16, bf16, 128)

}  // namespace pyrt
