// compact: x[r] = x[rows[r]] in place for r < R and strictly ascending rows, when rows of a batch
// leave. Named by the width in bytes of what one thread moves.
//
// Bytes moved: at most 2 * R * row_bytes; rows already in place are not touched.
// Limit: HBM bandwidth; one barrier per block_rows * kDepth rows.
//
// In place is safe without a copy of x: a block owns a strip of columns and walks it from the top.
// rows ascends, so rows[r] >= r: a step reads only at or below the first row it writes, and all its
// reads are done (the barrier) before its first write. Blocks share no column.
#include "common.cuh"

namespace pyrt {

constexpr int kDepth = 8;  // rows in flight per thread

// Block (columns, rows); grid over column strips.
template <typename T>
__device__ void compact_rows(T* x, const int* __restrict__ rows, const int* __restrict__ kept,
                             i64 width) {
  const i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = *kept;
  const int step = blockDim.y * kDepth;
  for (int first = 0; first < count; first += step) {
    T held[kDepth];
    bool moves[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int r = first + i * blockDim.y + threadIdx.y;
      const int source = r < count ? rows[r] : r;
      moves[i] = source != r && column < width;
      if (moves[i]) held[i] = x[source * width + column];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int r = first + i * blockDim.y + threadIdx.y;
      if (moves[i]) x[r * width + column] = held[i];
    }
  }
}

#define PYRT_COMPACT(bytes, T)                                             \
  extern "C" __global__ void __launch_bounds__(512)                        \
      compact_##bytes(T* x, const int* rows, const int* kept, i64 width) { \
    compact_rows(x, rows, kept, width);                                    \
  }

PYRT_COMPACT(16, uint4)
PYRT_COMPACT(8, uint2)
PYRT_COMPACT(4, u32)
PYRT_COMPACT(2, unsigned short)
PYRT_COMPACT(1, unsigned char)

}  // namespace pyrt
