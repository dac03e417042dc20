// What the handlers share: errors as sentences, and memory that is kept between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace fusedllm {

namespace ffi = xla::ffi;

inline ffi::Error refuse(std::string sentence) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "fusedllm: " + std::move(sentence));
}

// Uninitialized memory on a cache line's boundary, which grows and is never given back: a step asks for the same again.
// One for each thread and use: a handler may run in several threads at once.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <typename T>
  T* of(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace fusedllm
