// segment_matmul: out[r] = epilogue(x[source(r)] @ W[s]^T + bias[s]) for the rows r of segment s,
// the grouped GEMM of a plan. W is dense [S, N, K]; for a pair (kSiluMul, kSwigluOai) its rows are
// I = N/2 gate rows, then I up rows, and out[r] is [I]. source(r) is rows[r], or r where rows is
// null. float32 accumulate, the epilogue applied before the one rounding to the output type.
//
// Bytes moved: weights of the segments that have rows (once in _small) + R * K read + R * N
// written. Limits: _small  HBM bandwidth (weight bytes); right up to any count, meant for <= 16
// rows a segment
//         _tile   tensor cores by mma.sync; on sm_90 that path tops out near 60-65 % of wgmma's
//         peak,
//                 so large segments belong to torch.nn.functional.grouped_mm
//         _simt   FMA rate of the plain cores: float32, or bf16 with a K the others cannot load
//
// R is read from offsets; the grid is sized for capacity, a block without work leaves at once.
// The order of summation depends on K and the kernel alone, never on which rows share the batch.
#include "common.cuh"

namespace pyrt {

enum Epilogue { kNone = 0, kGelu = 1, kSilu = 2, kRelu = 3, kSiluMul = 4, kSwigluOai = 5 };

struct Matmul {
  const void* x;       // [*, K]
  const void* weight;  // [S, N, K]
  const float* bias;   // [S, N] or null
  const int* rows;     // [capacity] or null
  const int* offsets;  // [S+1] or null: one segment of `capacity` rows
  void* out;           // [capacity, columns]
  int capacity;
  int segments;      // S
  int out_features;  // N
  int in_features;   // K
  int epilogue;
  int out_float;       // out is float32, else bf16
  float alpha, limit;  // of kSwigluOai

  __device__ bool pair() const { return epilogue >= kSiluMul; }
  __device__ int columns() const { return pair() ? out_features / 2 : out_features; }
  __device__ int begin(int segment) const { return offsets ? offsets[segment] : 0; }
  __device__ int end(int segment) const { return offsets ? offsets[segment + 1] : capacity; }
  __device__ i64 source(int row) const { return rows ? rows[row] : row; }
};

// Rows first .. first + count of the packed order, all of one segment; count 0: nothing to do.
struct RowTile {
  int segment, first, count;
};

// The slot-th tile of kRows rows when every segment is cut into tiles from its first row on. Every
// warp finds it by itself: 32 segments at a time.
template <int kRows>
__device__ inline RowTile find_tile(const Matmul& m, int slot) {
  for (int base = 0; base < m.segments; base += kWarp) {
    const int segment = base + lane_id();
    const int begin = segment < m.segments ? m.begin(segment) : 0;
    const int end = segment < m.segments ? m.end(segment) : 0;
    const int tiles = ceil_div(end - begin, kRows);
    const int upto = warp_inclusive_scan(tiles);
    const u32 later = __ballot_sync(kAllLanes, slot < upto);
    if (later) {
      const int owner = __ffs(later) - 1;
      const int first = begin + (slot - (upto - tiles)) * kRows;
      const int count = min(kRows, end - first);
      return {base + owner, __shfl_sync(kAllLanes, first, owner),
              __shfl_sync(kAllLanes, count, owner)};
    }
    slot -= __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  return {0, 0, 0};
}

// ---- epilogue ----

__device__ inline float silu(float value, float slope) {
  return value / (1.0f + expf(-slope * value));
}

// The result of one output element: `value` is the sum of its column, `up` that of its up column.
__device__ inline float finish(const Matmul& m, int segment, int column, float value, float up) {
  if (m.bias) {
    const float* bias = m.bias + i64(segment) * m.out_features;
    value += bias[column];
    if (m.pair()) up += bias[m.columns() + column];
  }
  if (m.epilogue == kGelu) return gelu(value);
  if (m.epilogue == kSilu) return silu(value, 1.0f);
  if (m.epilogue == kRelu) return value < 0.0f ? 0.0f : value;
  if (!m.pair()) return value;
  float slope = 1.0f;
  if (m.epilogue == kSwigluOai) {  // comparisons that let a NaN through
    value = value > m.limit ? m.limit : value;
    up = (up > m.limit ? m.limit : up < -m.limit ? -m.limit : up) + 1.0f;
    slope = m.alpha;
  }
  return silu(value, slope) * up;
}

__device__ inline void put(const Matmul& m, int row, int column, float value) {
  const i64 at = i64(row) * m.columns() + column;
  if (m.out_float) {
    static_cast<float*>(m.out)[at] = value;
  } else {
    store(static_cast<bf16*>(m.out) + at, value);
  }
}

// ---- small segments ----

constexpr int kSmallWarps = 8;
constexpr int kSmallRows = 16;

// A block makes 8 * kTiles weight rows of one segment (kSiluMul: half gate, half up). Its warps
// take turns along K, 64 elements each, and their sums meet in shared memory in a fixed order.
//
// The dot product does not care how k is numbered, so a lane loads 16 contiguous bytes of a weight
// row and of an x row, and the eight elements serve as the q, q+1, q+8, q+9 of two mma steps: full
// sectors from HBM, no shared memory, no shuffle.
template <int kTiles>
__device__ void small_segment(const Matmul& m) {
  __shared__ float sums[kSmallWarps][kSmallRows][8 * kTiles];
  constexpr int kColumns = 8 * kTiles;
  const int segment = blockIdx.y;
  const int begin = m.begin(segment), end = m.end(segment);
  if (begin == end) return;
  const int half = m.columns();
  const int out_columns = m.pair() ? kColumns / 2 : kColumns;
  const int first_column = blockIdx.x * out_columns;
  const int g = lane_id() / 4, q = lane_id() % 4;

  const bf16* weight[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    // A row past the matrix is read as the last one and never stored.
    const bool up = m.pair() && t >= kTiles / 2;
    const int column = first_column + 8 * (up ? t - kTiles / 2 : t) + g;
    const int row = min(column, half - 1) + (up ? half : 0);
    weight[t] = static_cast<const bf16*>(m.weight) +
                (i64(segment) * m.out_features + row) * m.in_features + 8 * q;
  }

  for (int first = begin; first < end; first += kSmallRows) {
    const int count = min(kSmallRows, end - first);
    // Rows past the segment repeat its last row: same addresses, no traffic, never stored.
    const bf16* x = static_cast<const bf16*>(m.x) + 8 * q;
    const bf16* x_low = x + m.source(first + min(g, count - 1)) * m.in_features;
    const bf16* x_high = x + m.source(first + min(g + 8, count - 1)) * m.in_features;
    float c[kTiles][4] = {};
#pragma unroll 2
    for (int k = warp_id() * 64; k < m.in_features; k += kSmallWarps * 64) {
      uint4 w[2][kTiles], low[2], high[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = k + 32 * part;
        const bool inside = at + 8 * q < m.in_features;  // K is a multiple of 8
        const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) w[part][t] = inside ? load_once(weight[t] + at) : zero;
        low[part] = inside ? *reinterpret_cast<const uint4*>(x_low + at) : zero;
        high[part] = inside ? *reinterpret_cast<const uint4*>(x_high + at) : zero;
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint4 l = low[part], h = high[part];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma(c[t], l.x, h.x, l.y, h.y, w[part][t].x, w[part][t].y);
          mma(c[t], l.z, h.z, l.w, h.w, w[part][t].z, w[part][t].w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp_id()][g + 8 * (i / 2)][8 * t + 2 * q + i % 2] = c[t][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * out_columns; i += blockDim.x) {
      const int row = i / out_columns, column = i % out_columns;
      if (first_column + column >= half) continue;
      float value = 0.0f, up = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kSmallWarps; ++warp) {
        value += sums[warp][row][column];
        if (m.pair()) up += sums[warp][row][out_columns + column];
      }
      const int n = first_column + column;
      put(m, first + row, n, finish(m, segment, n, value, up));
    }
    __syncthreads();  // sums are reused by the next rows
  }
}

// ---- tensor core tiles ----

constexpr int kTileColumns = 128;
constexpr int kTileDepth = 64;  // a row of a stage is 128 bytes: eight chunks of 16
constexpr int kStages = 3;

// Byte offset of a chunk in a stage. The exclusive or spreads the eight rows that ldmatrix reads
// together over all banks.
__device__ inline u32 chunk_offset(int row, int chunk) {
  return row * 128 + (chunk ^ row % 8) * 16;
}

// Row of W for row b of a weight tile. kSiluMul puts 16 gate rows and their 16 up rows into the 32
// columns of one warp, so that a thread holds both sums of an output.
__device__ inline int weight_row(const Matmul& m, int b) {
  if (!m.pair()) return blockIdx.y * kTileColumns + b;
  const int column = blockIdx.y * (kTileColumns / 2) + b / 32 * 16 + b % 16;
  return column < m.columns() ? column + (b / 16 % 2) * m.columns() : m.out_features;
}

// A block of 8 warps (2 x 4) makes kRows x 128 sums; a warp kRows/2 x 32.
template <int kRows>
__device__ void tile(const Matmul& m) {
  extern __shared__ __align__(128) unsigned char stages[];
  constexpr int kLoadsA = kRows / 32, kLoadsB = kTileColumns / 32;
  constexpr int kBytesA = kRows * 128, kStageBytes = kBytesA + kTileColumns * 128;
  constexpr int kFragments = kRows / 32;  // of 16 rows, per warp

  const RowTile rows = find_tile<kRows>(m, blockIdx.x);
  if (rows.count <= 0) return;

  // Loading: thread t moves chunk t % 8 of rows t / 8, t / 8 + 32, ...
  const int chunk = threadIdx.x % 8, loader = threadIdx.x / 8;
  const bf16* x = static_cast<const bf16*>(m.x);
  const bf16* weight =
      static_cast<const bf16*>(m.weight) + i64(rows.segment) * m.out_features * m.in_features;
  const bf16* from_a[kLoadsA];
  const bf16* from_b[kLoadsB];
  u32 inside = 0;  // bit per load
#pragma unroll
  for (int i = 0; i < kLoadsA; ++i) {
    const int row = loader + 32 * i;
    const bool live = row < rows.count;
    from_a[i] = x + (live ? m.source(rows.first + row) * m.in_features : 0);
    inside |= u32(live) << i;
  }
#pragma unroll
  for (int i = 0; i < kLoadsB; ++i) {
    const int row = weight_row(m, loader + 32 * i);
    const bool live = row < m.out_features;
    from_b[i] = weight + (live ? i64(row) * m.in_features : 0);
    inside |= u32(live) << (kLoadsA + i);
  }
  const u32 base = shared_address(stages);
  const int steps = ceil_div(m.in_features, kTileDepth);
  auto fetch = [&](int step) {
    const int k = step * kTileDepth + chunk * 8;
    const bool deep = k < m.in_features;  // K is a multiple of 8
    const int at = deep ? k : 0;
    const u32 to = base + step % kStages * kStageBytes + chunk_offset(loader, chunk);
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i)
      copy_async(to + i * 32 * 128, from_a[i] + at, deep && (inside >> i & 1));
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i)
      copy_async(to + kBytesA + i * 32 * 128, from_b[i] + at,
                 deep && (inside >> (kLoadsA + i) & 1));
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    commit_copies();
  }

  const int warp_row = warp_id() / 4 * (kRows / 2), warp_column = warp_id() % 4 * 32;
  const int lane = lane_id();
  float c[kFragments][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the stage is whole, and the one fetched next has been consumed by all
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    commit_copies();  // also when empty: the wait counts groups
    const u32 stage = base + step % kStages * kStageBytes;
#pragma unroll
    for (int k = 0; k < kTileDepth / 16; ++k) {
      u32 a[kFragments][4], b[2][4];
#pragma unroll
      for (int i = 0; i < kFragments; ++i)
        load_matrices(a[i], stage + chunk_offset(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices(b[j], stage + kBytesA +
                                chunk_offset(warp_column + 16 * j + lane / 16 * 8 + lane % 8,
                                             2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma(c[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][2 * (j % 2)],
              b[j / 2][2 * (j % 2) + 1]);
      }
    }
  }

  const int width = m.pair() ? 16 : 32;  // output columns of a warp
  const int first_column = blockIdx.y * 4 * width + warp_id() % 4 * width + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (m.pair() && j >= 2) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + 16 * i + lane / 4 + e / 2 * 8;
        const int column = first_column + 8 * j + e % 2;
        if (row >= rows.count || column >= m.columns()) continue;
        const float up = j < 2 ? c[i][(j + 2) % 4][e] : 0.0f;
        put(m, rows.first + row, column, finish(m, rows.segment, column, c[i][j][e], up));
      }
    }
  }
}

// ---- plain cores ----

// 64 x 64 outputs a block, 4 x 4 a thread (4 x 4 gate and up sums for kSiluMul), 16 of K at a time.
template <typename T>
__device__ void simt(const Matmul& m) {
  constexpr int kSide = 64, kDepth = 16;
  __shared__ float a[kDepth][kSide + 1], b[2][kDepth][kSide + 1];
  const RowTile rows = find_tile<kSide>(m, blockIdx.x);
  if (rows.count <= 0) return;
  const T* x = static_cast<const T*>(m.x);
  const T* weight =
      static_cast<const T*>(m.weight) + i64(rows.segment) * m.out_features * m.in_features;
  const int first_column = blockIdx.y * kSide;
  const int depth = threadIdx.x % kDepth, loader = threadIdx.x / kDepth;  // 16 x 16
  const int mine_row = threadIdx.x / 16, mine_column = threadIdx.x % 16;
  float c[2][4][4] = {};
  for (int k = 0; k < m.in_features; k += kDepth) {
    const bool deep = k + depth < m.in_features;
#pragma unroll
    for (int i = loader; i < kSide; i += 16) {
      const bool live = deep && i < rows.count;
      a[depth][i] = live ? to_float(x[m.source(rows.first + i) * m.in_features + k + depth]) : 0.0f;
      for (int h = 0; h < (m.pair() ? 2 : 1); ++h) {
        const int column = first_column + i;
        const i64 row = column + i64(h) * m.columns();
        b[h][depth][i] =
            deep && column < m.columns() ? to_float(weight[row * m.in_features + k + depth]) : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // a constant index keeps c in registers
        if (h == 1 && !m.pair()) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            c[h][i][j] += a[d][mine_row + 16 * i] * b[h][d][mine_column + 16 * j];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = mine_row + 16 * i, column = first_column + mine_column + 16 * j;
      if (row >= rows.count || column >= m.columns()) continue;
      put(m, rows.first + row, column, finish(m, rows.segment, column, c[0][i][j], c[1][i][j]));
    }
  }
}

// Grid (ceil(N / 16 or 32), S), 256 threads; the suffix is the number of weight rows of a block.
extern "C" __global__ void __launch_bounds__(256) segment_matmul_small_16(Matmul m) {
  small_segment<2>(m);
}
extern "C" __global__ void __launch_bounds__(256) segment_matmul_small_32(Matmul m) {
  small_segment<4>(m);
}

// Grid (capacity / rows + min(S, capacity), ceil(N / 128)), 256 threads, shared memory
// kStages * (rows + 128) * 128 bytes; the suffix is the number of rows of a block.
extern "C" __global__ void __launch_bounds__(256, 2) segment_matmul_tile_64(Matmul m) {
  tile<64>(m);
}
extern "C" __global__ void __launch_bounds__(256, 2) segment_matmul_tile_128(Matmul m) {
  tile<128>(m);
}

// Grid (capacity / 64 + min(S, capacity), ceil(columns / 64)), 256 threads.
extern "C" __global__ void __launch_bounds__(256) segment_matmul_simt_f32(Matmul m) {
  simt<float>(m);
}
extern "C" __global__ void __launch_bounds__(256) segment_matmul_simt_bf16(Matmul m) {
  simt<bf16>(m);
}

}  // namespace pyrt
