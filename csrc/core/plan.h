// Plain views of what an op reads and writes. No CUDA, no Python, no torch.
#pragma once

#include <cstdint>

namespace pyrt {

using bf16 = uint16_t;  // storage only; arithmetic is float32

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}

// A routing decision (pyruntime/plan.py). rows may be null: the identity, R == N, one segment.
struct PlanView {
  const int32_t* rows = nullptr;     // [R]
  const int32_t* offsets = nullptr;  // [S+1]
  const float* weights = nullptr;    // [R] or null for 1
  const int32_t* inverse = nullptr;  // [N, K]
  int64_t num_rows = 0;              // N
  int64_t choices = 1;               // K
  int64_t segments = 1;              // S
  int64_t kept = 0;                  // R
};

}  // namespace pyrt
