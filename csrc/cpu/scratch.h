// Per-thread working memory that only grows; every kernel takes what it needs at its start.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace pyrt::PYRT_ISA {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pyrt::PYRT_ISA
