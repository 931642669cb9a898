// gather: out[r] = x[rows[r]] for r < R, the dispatch of packed rows. Rows are copied as bits, so
// the kernels are named by the width in bytes of what one thread moves, not by dtype.
//
// Bytes moved: R * row_bytes read (once from HBM while x fits L2) + R * row_bytes written + 4 R.
// Limit: HBM bandwidth; launch latency below about 4 MB.
// R is read from the device; blocks beyond it leave at once, rows >= R of out stay as they were.
#include "common.cuh"

namespace pyrt {

// Block (columns, rows): a block copies blockDim.y rows, a row by blockDim.x threads.
template <typename T>
__device__ void gather_rows(const T* __restrict__ x, const int* __restrict__ rows,
                            const int* __restrict__ kept, T* __restrict__ out, i64 width,
                            int capacity) {
  const int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= capacity) return;
  const int source = rows[r];  // loaded together with *kept: one latency instead of two
  if (r >= *kept) return;
  const T* from = x + source * width;
  T* to = out + r * width;
#pragma unroll 4
  for (i64 column = threadIdx.x; column < width; column += blockDim.x) to[column] = from[column];
}

#define PYRT_GATHER(bytes, T)                                                          \
  extern "C" __global__ void __launch_bounds__(256) gather_##bytes(                    \
      const T* x, const int* rows, const int* kept, T* out, i64 width, int capacity) { \
    gather_rows(x, rows, kept, out, width, capacity);                                  \
  }

PYRT_GATHER(16, uint4)
PYRT_GATHER(8, uint2)
PYRT_GATHER(4, u32)
PYRT_GATHER(2, unsigned short)
PYRT_GATHER(1, unsigned char)

}  // namespace pyrt
