// The two ends of embed_patches; between them lies one matrix product.
//
// gather_patches: squares of images, each shrunk to size x size pixels by a box filter, as rows in
// the order (C, y, x) of a convolution's kernel. Sums run row by row and from left to right, then
// one product: the bits of the CPU and of the reference.
//   Bytes moved: ratio^2 * 4 read (64 at most of "bilinear") + 2 or 4 written per element. Limit:
//   HBM bandwidth.
// embed_rows: out[out_rows[r]] = epilogue(product[r] + bias + positions[position_rows[r]]), summed
// in float32, rounded once.
//   Bytes moved: R * D read + R * D written; bias and positions come from L2. Limit: HBM bandwidth.
//
// R is `capacity`, or less where `kept` is given and says so: rows from there on are not written.
#include "common.cuh"

namespace pyrt {

struct Squares {
  const float* pixels;
  const i64* table;   // [B, 3] first element, height and width
  const int* places;  // [capacity, 4] image, top, left, ratio
  const int* kept;    // [1] or null
  void* out;          // [capacity, channels * size * size]
  int capacity, channels, size;
  int middle;  // the mean of the middle 2 x 2 (1 x 1) of a block, not of all of it
};

// One square: where its image is, and which pixels of a block count.
struct Square {
  const float* image;
  i64 height, width;
  int top, left, ratio, first, last;
  float share;
};

__device__ inline Square square_of(const Squares& a, int r) {
  const int* place = a.places + 4 * i64(r);
  const i64* image = a.table + 3 * i64(place[0]);
  Square s{a.pixels + image[0], image[1], image[2], place[1], place[2], place[3], 0, place[3]};
  if (a.middle) s.first = (s.ratio - 1) / 2, s.last = s.ratio / 2 + 1;
  const int side = s.last - s.first;
  s.share = __fdiv_rn(1.0f, static_cast<float>(side * side));
  return s;
}

__device__ inline float pixel_of(const Square& s, int channel, int y, int x) {
  const i64 left = s.left + i64(x) * s.ratio;
  float total = -0.0f;  // the sum of nothing that changes not even the sign of a zero
  for (int dy = s.first; dy < s.last; ++dy) {
    const i64 line = s.top + i64(y) * s.ratio + dy;
    const bool inside = line >= 0 && line < s.height;
    const float* row = s.image + (channel * s.height + line) * s.width;
    for (int dx = s.first; dx < s.last; ++dx) {
      const i64 column = left + dx;
      total = __fadd_rn(total, inside && column >= 0 && column < s.width ? row[column] : 0.0f);
    }
  }
  return __fmul_rn(total, s.share);
}

// Eight of them, from x on, of a square with this ratio, as sums of the same order: what patches
// inside of an image are made of. False: they do not lie within it or on 16 bytes; none was read.
template <int kRatio>
__device__ inline bool run_of(const Square& s, int channel, int y, int x, float (&value)[8]) {
  const i64 line = s.top + i64(y) * kRatio, at = s.left + i64(x) * kRatio;
  const float* run = s.image + (channel * s.height + line) * s.width + at;
  if (s.ratio != kRatio || line < 0 || line + kRatio > s.height || at < 0 ||
      at + 8 * kRatio > s.width || reinterpret_cast<unsigned long long>(run) % 16 != 0 ||
      (kRatio > 1 && s.width % 4 != 0))
    return false;
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = -0.0f;
#pragma unroll
  for (int dy = 0; dy < kRatio; ++dy) {
#pragma unroll
    for (int part = 0; part < kRatio; ++part) {
      float pixels[8];
      load<8>(run + dy * s.width + 8 * part, pixels);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& total = value[(8 * part + i) / kRatio];
        total = __fadd_rn(total, pixels[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = __fmul_rn(value[i], s.share);
  return true;
}

// A warp per row, V elements a lane at a time. _v8 needs channels * size^2 to be a multiple of 8.
template <typename T, int V>
__device__ void gather_squares(const Squares& a) {
  const int r = blockIdx.x * (blockDim.x / kWarp) + warp_id();
  if (r >= a.capacity || (a.kept && r >= *a.kept)) return;
  const Square s = square_of(a, r);
  const int area = a.size * a.size, width = a.channels * area;
  T* out = static_cast<T*>(a.out) + i64(r) * width;
  for (int column = lane_id() * V; column < width; column += kWarp * V) {
    int channel = column / area, y = column % area / a.size, x = column % a.size;
    float value[V];
    bool done = false;
    if constexpr (V == 8) {
      if (x + V <= a.size)
        done = run_of<1>(s, channel, y, x, value) || run_of<2>(s, channel, y, x, value);
    }
    if (!done) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = pixel_of(s, channel, y, x);
        if (++x == a.size) x = 0, ++y;
        if (y == a.size) y = 0, ++channel;
      }
    }
    store<V>(out + column, value);
  }
}

#define PYRT_GATHER_PATCHES(name, T, V) \
  extern "C" __global__ void __launch_bounds__(256) name(Squares a) { gather_squares<T, V>(a); }

PYRT_GATHER_PATCHES(gather_patches_bf16_v8, bf16, 8)
PYRT_GATHER_PATCHES(gather_patches_bf16_v1, bf16, 1)
PYRT_GATHER_PATCHES(gather_patches_f32_v8, float, 8)
PYRT_GATHER_PATCHES(gather_patches_f32_v1, float, 1)

struct Embedded {
  const void* product;       // [capacity, D]
  const float* bias;         // [D] or null
  const float* positions;    // [M, D] or null
  const int* position_rows;  // [capacity]
  const int* kept;           // [1] or null
  const int* out_rows;       // [capacity] or null for the identity
  void* out;                 // [T, D]
  i64 width;                 // D
  int capacity;
  int activate;   // GELU
  int out_float;  // out is float32, else bf16
};

// Block (columns, rows). _v8 needs a D that is a multiple of 8 and 16-byte aligned pointers.
template <typename T, int V>
__device__ void embed_row(const Embedded& a) {
  const int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= a.capacity || (a.kept && r >= *a.kept)) return;
  const T* from = static_cast<const T*>(a.product) + r * a.width;
  const float* position = a.positions ? a.positions + a.position_rows[r] * a.width : nullptr;
  const i64 to = (a.out_rows ? a.out_rows[r] : r) * a.width;
  for (i64 h = threadIdx.x * V; h < a.width; h += blockDim.x * V) {
    float value[V], more[V];
    load<V>(from + h, value);
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      const float* vector = term ? position : a.bias;
      if (!vector) continue;
      load<V>(vector + h, more);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] += more[i];
    }
    if (a.activate) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = gelu(value[i]);
    }
    a.out_float ? store<V>(static_cast<float*>(a.out) + to + h, value)
                : store<V>(static_cast<bf16*>(a.out) + to + h, value);
  }
}

#define PYRT_EMBED_ROWS(name, T, V) \
  extern "C" __global__ void __launch_bounds__(256) name(Embedded a) { embed_row<T, V>(a); }

PYRT_EMBED_ROWS(embed_rows_bf16_v8, bf16, 8)
PYRT_EMBED_ROWS(embed_rows_bf16_v1, bf16, 1)
PYRT_EMBED_ROWS(embed_rows_f32_v8, float, 8)
PYRT_EMBED_ROWS(embed_rows_f32_v1, float, 1)

}  // namespace pyrt
