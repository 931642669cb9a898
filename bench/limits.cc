// Ceilings of this machine: memory bandwidth and arithmetic peak, each the best of several loops.
// Built and run by limits.py. Usage: limits THREADS MEGABYTES; prints one JSON object.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef float Lanes __attribute__((vector_size(64)));
constexpr int kChains = 24;
#elif defined(__AVX2__)
typedef float Lanes __attribute__((vector_size(32)));
constexpr int kChains = 12;
#else
typedef float Lanes __attribute__((vector_size(16)));
constexpr int kChains = 12;
#endif

constexpr int kRepeats = 7;
volatile float sink;

template <class F>
double best_seconds(F&& run) {
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

// Every thread reads its own part as `kStreams` neighbouring streams.
template <int kStreams>
void read_all(const Lanes* x, int64_t count) {
#pragma omp parallel
  {
    const int64_t part = count / omp_get_num_threads() / kStreams;
    const Lanes* from = x + omp_get_thread_num() * part * kStreams;
    Lanes total[8] = {};
    for (int64_t i = 0; i + 8 / kStreams <= part; i += 8 / kStreams) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 8
        for (int j = 0; j < 8 / kStreams; ++j) {
          const Lanes* at = from + s * part + i + j;
          __builtin_prefetch(at + 32);
          total[s * (8 / kStreams) + j] += *at;
        }
      }
    }
    for (int j = 1; j < 8; ++j) total[0] += total[j];
    sink = total[0][0];
  }
}

void copy_plain(char* to, const char* from, int64_t bytes) {
#pragma omp parallel
  {
    const int64_t part = bytes / omp_get_num_threads(), at = part * omp_get_thread_num();
    std::memcpy(to + at, from + at, part);
  }
}

#if defined(__SSE2__)
void copy_streamed(char* to, const char* from, int64_t bytes) {
#pragma omp parallel
  {
    const int64_t part = bytes / omp_get_num_threads() / 64 * 64, at = part * omp_get_thread_num();
    for (int64_t i = at; i < at + part; i += 64) {
      __builtin_prefetch(from + i + 1024);
      for (int j = 0; j < 64; j += 16)
        _mm_stream_si128((__m128i*)(to + i + j), _mm_load_si128((const __m128i*)(from + i + j)));
    }
    _mm_sfence();
  }
}
#endif

// Independent chains of fused multiply-adds in registers: nothing but the arithmetic units.
double fp32_gflops() {
  constexpr int64_t kSteps = 4 << 20;
  const double seconds = best_seconds([&] {
#pragma omp parallel
    {
      Lanes chain[kChains], a, b;
      for (unsigned i = 0; i < sizeof(Lanes) / 4; ++i) a[i] = 0.999f, b[i] = 1e-3f;
      for (auto& c : chain) c = b;
      for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
        for (auto& c : chain) c = c * a + b;
      }
      Lanes total{};
      for (auto& c : chain) total += c;
      sink = total[0];
    }
  });
  return double(omp_get_max_threads()) * kSteps * kChains * (sizeof(Lanes) / 4) * 2 / seconds / 1e9;
}

double bf16_gflops() {
#if defined(__AVX512BF16__)
  constexpr int64_t kSteps = 4 << 20;
  const double seconds = best_seconds([&] {
#pragma omp parallel
    {
      __m512 chain[kChains];
      const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = a;
      for (auto& c : chain) c = _mm512_setzero_ps();
      for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
        for (auto& c : chain) c = _mm512_dpbf16_ps(c, a, b);
      }
      __m512 total = _mm512_setzero_ps();
      for (auto& c : chain) total = _mm512_add_ps(total, c);
      sink = _mm512_cvtss_f32(total);
    }
  });
  return double(omp_get_max_threads()) * kSteps * kChains * 64 / seconds / 1e9;
#else
  return 0;  // no such instruction: bf16 runs as float32
#endif
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  omp_set_num_threads(std::atoi(argv[1]));
  const int64_t bytes = int64_t(std::atoi(argv[2])) << 20;
  auto* x = static_cast<char*>(std::aligned_alloc(2 << 20, bytes));
  auto* y = static_cast<char*>(std::aligned_alloc(2 << 20, bytes));
  if (!x || !y) return 1;
  madvise(x, bytes,
          MADV_HUGEPAGE);  // large pages where there are any: a ceiling, not a typical loop
  madvise(y, bytes, MADV_HUGEPAGE);
  std::memset(x, 0, bytes);
  std::memset(y, 0, bytes);
  const auto* lanes = reinterpret_cast<const Lanes*>(x);
  const int64_t count = bytes / int64_t(sizeof(Lanes));
  double read = best_seconds([&] { read_all<1>(lanes, count); });
  read = std::min(read, best_seconds([&] { read_all<2>(lanes, count); }));
  read = std::min(read, best_seconds([&] { read_all<4>(lanes, count); }));
  double copy = best_seconds([&] { copy_plain(y, x, bytes); });
#if defined(__SSE2__)
  copy = std::min(copy, best_seconds([&] { copy_streamed(y, x, bytes); }));
#endif
  std::printf(
      "{\"read_gb_per_s\": %.3f, \"copy_gb_per_s\": %.3f, \"fp32_gflops\": %.2f, "
      "\"bf16_gflops\": %.2f}\n",
      bytes / read / 1e9, 2 * bytes / copy / 1e9, fp32_gflops(), bf16_gflops());
}
