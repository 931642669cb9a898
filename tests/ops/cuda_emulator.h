// Enough of CUDA to run csrc/cuda/*.cu on a CPU, one block at a time: every CUDA thread is a
// coroutine that yields where threads meet (barriers, shuffles, votes, matrix instructions). It
// checks logic and indices, not timing, and nothing about how the hardware orders memory; threads
// run in both directions in turn, so that a missing barrier shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace emu {

constexpr int kLanes = 32;

struct Meeting {  // of the threads that must all arrive before one goes on
  int arrived = 0;
  long generation = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t slots[2][kLanes];
};

struct Thread {
  ucontext_t context;
  Index index;
  int id = 0;
  bool done = false;
};

inline Thread* current = nullptr;
inline Index block_index, block_size, grid_size;
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Meeting block;
inline std::function<void()> body;
inline long progress = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void meet(Meeting& meeting, int expected) {
  const long generation = meeting.generation;
  ++progress;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

// Everyone's value, by lane. Two buffers: a lane is at most one exchange ahead of another.
inline const uint64_t* exchange(uint64_t value) {
  Warp& warp = warps[current->id / kLanes];
  uint64_t* slots = warp.slots[warp.meeting.generation % 2];
  slots[current->id % kLanes] = value;
  meet(warp.meeting, kLanes);
  return slots;
}

inline void entry() {
  body();
  current->done = true;
  ++progress;
  yield();
}

inline void run_block(unsigned count) {
  constexpr size_t kStack = 128 << 10;
  static std::vector<char> stacks;
  if (stacks.size() < count * kStack) stacks.resize(count * kStack);
  threads.assign(count, Thread{});
  warps.assign((count + kLanes - 1) / kLanes, Warp{});
  block = Meeting{};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.id = i;
    thread.index = {i % block_size.x, i / block_size.x, 0};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, entry, 0);
  }
  unsigned finished = 0;
  for (long round = 0; finished < count; ++round) {
    const long before = progress;
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = threads[round % 2 ? count - 1 - i : i];
      if (thread.done) continue;
      current = &thread;
      swapcontext(&scheduler, &thread.context);
      finished += thread.done;
    }
    if (progress == before) {
      std::fprintf(stderr, "emulator: the threads of a block wait for each other\n");
      std::abort();
    }
  }
}

using Call = void (*)(const char* args);
inline std::map<std::string, Call> kernels;

template <typename T>
T take(const char* args, size_t* at) {
  *at = (*at + alignof(T) - 1) / alignof(T) * alignof(T);
  T value;
  std::memcpy(&value, args + *at, sizeof(T));
  *at += sizeof(T);
  return value;
}

template <typename... Args>
void unpack(void (*kernel)(Args...), const char* args) {
  size_t at = 0;
  std::tuple<Args...> values{take<Args>(args, &at)...};  // braces evaluate left to right
  std::apply(kernel, values);
}

}  // namespace emu

#define threadIdx (emu::current->index)
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size

inline void __syncthreads() { emu::meet(emu::block, int(emu::threads.size())); }
inline void __syncwarp() { emu::exchange(0); }
inline int __shfl_up_sync(unsigned, int value, int by) {
  const int lane = emu::current->id % 32;
  return int(emu::exchange(uint32_t(value))[lane >= by ? lane - by : lane]);
}
inline int __shfl_sync(unsigned, int value, int lane) {
  return int(emu::exchange(uint32_t(value))[lane]);
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __shfl_sync(unsigned, float value, int lane) {
  return __uint_as_float(unsigned(emu::exchange(__float_as_uint(value))[lane]));
}
inline float __shfl_xor_sync(unsigned, float value, int by) {
  const int lane = emu::current->id % 32;
  return __uint_as_float(unsigned(emu::exchange(__float_as_uint(value))[lane ^ by]));
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emu::exchange(vote);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(votes[i]) << i;
  return mask;
}
inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* values = emu::exchange(uint32_t(value));
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(values[i] == uint32_t(value)) << i;
  return mask;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* values = emu::exchange(value);
  return unsigned(*std::max_element(values, values + 32));
}
inline int __reduce_min_sync(unsigned, int value) {
  const uint64_t* values = emu::exchange(uint32_t(value));
  int least = int(values[0]);
  for (int i = 1; i < 32; ++i) least = std::min(least, int(values[i]));
  return least;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(int(value)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

// ---- instead of csrc/cuda/ptx.cuh ----

namespace pyrt {

using u32 = unsigned int;

inline u32 pack_bf16(float low, float high) {
  auto round = [](float value) -> u32 {
    const u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}

inline float fast_exp2(float value) { return std::exp2(value); }

inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }

inline const char* shared_base = nullptr;
inline u32 shared_address(const void* pointer) {
  shared_base = static_cast<const char*>(pointer);
  return 0;
}
inline void copy_async(u32 to, const void* from, bool inside) {
  char* target = const_cast<char*>(shared_base) + to;
  inside ? std::memcpy(target, from, 16) : std::memset(target, 0, 16);
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}

inline void load_matrices(u32 (&to)[4], u32 from) {
  const int lane = emu::current->id % 32;
  const uint64_t* rows = emu::exchange(from);
  for (int i = 0; i < 4; ++i)
    std::memcpy(&to[i], shared_base + rows[8 * i + lane / 4] + lane % 4 * 4, 4);
}

inline void load_matrices_transposed(u32 (&to)[4], u32 from) {
  const int lane = emu::current->id % 32;
  const uint64_t* rows = emu::exchange(from);
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int e = 0; e < 2; ++e)
      std::memcpy(&pair[e], shared_base + rows[8 * i + lane % 4 * 2 + e] + lane / 4 * 2, 2);
    to[i] = pair[0] | u32(pair[1]) << 16;
  }
}

// Element `k` (0..15) of fragment words for k < 8 and k >= 8.
inline float fragment(uint64_t words, int k) {
  const u32 word = k < 8 ? u32(words) : u32(words >> 32);
  return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16);
}

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = emu::current->id % 32;
  uint64_t top[32], bottom[32], b[32];
  auto all = [](uint64_t low, uint64_t high, uint64_t* to) {
    std::copy_n(emu::exchange(low | high << 32), 32, to);
  };
  all(a0, a2, top);
  all(a1, a3, bottom);
  all(b0, b1, b);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k)
      c[e] += fragment((e < 2 ? top : bottom)[row * 4 + k % 8 / 2], k) *
              fragment(b[column * 4 + k % 8 / 2], k);
  }
}

}  // namespace pyrt

extern "C" int emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_x,
                       unsigned block_y, const char* args) {
  const auto kernel = emu::kernels.find(name);
  if (kernel == emu::kernels.end()) return 1;
  emu::grid_size = {grid_x, grid_y, 1};
  emu::block_size = {block_x, block_y, 1};
  emu::body = [&] { kernel->second(args); };
  for (unsigned y = 0; y < grid_y; ++y) {
    for (unsigned x = 0; x < grid_x; ++x) {
      emu::block_index = {x, y, 0};
      emu::run_block(block_x * block_y);
    }
  }
  return 0;
}
