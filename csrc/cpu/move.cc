// gather and compact: rows copied as bytes. Limit: one read and one write of every kept row.
#include <omp.h>

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ops.h"

namespace pyrt {
namespace {

constexpr int64_t kParallelBytes = 256 << 10;  // below, a second thread costs more than it copies
constexpr int64_t kStreamBytes = 16 << 20;  // beyond the cache: do not read lines only to overwrite

// `next` is the row to copy after this one: scattered rows defeat the hardware prefetcher, which
// stops at the end of each and starts late in the following one.
void copy_row(char* to, const char* from, const char* next, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      _mm_prefetch(next + i, _MM_HINT_NTA);
      const __m128i* src = reinterpret_cast<const __m128i*>(from + i);
      __m128i* dst = reinterpret_cast<__m128i*>(to + i);
      const __m128i a = _mm_loadu_si128(src), b = _mm_loadu_si128(src + 1);
      const __m128i c = _mm_loadu_si128(src + 2), d = _mm_loadu_si128(src + 3);
      _mm_stream_si128(dst, a), _mm_stream_si128(dst + 1, b);
      _mm_stream_si128(dst + 2, c), _mm_stream_si128(dst + 3, d);
    }
    std::memcpy(to + i, from + i, bytes - i);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace

void gather(const void* x, const int32_t* rows, int64_t kept, int64_t row_bytes, void* out) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const bool stream = kept * row_bytes >= kStreamBytes;
#pragma omp parallel for schedule(static) if (kept * row_bytes >= kParallelBytes)
  for (int64_t r = 0; r < kept; ++r)
    copy_row(to + r * row_bytes, from + rows[r] * row_bytes,
             from + rows[r + 1 < kept ? r + 1 : r] * row_bytes, row_bytes, stream);
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

void compact(void* x, const int32_t* rows, int64_t kept, int64_t row_bytes) {
  char* base = static_cast<char*>(x);
  for (int64_t r = 0; r < kept; ++r)
    if (rows[r] != r) std::memcpy(base + r * row_bytes, base + rows[r] * row_bytes, row_bytes);
}

}  // namespace pyrt
