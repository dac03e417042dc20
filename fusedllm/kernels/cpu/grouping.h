// Grouped codes (`kernels/grouped.py` describes their layout): matrices into them and back, many in one call.
#pragma once

#include <cstdint>

namespace fusedllm {

enum class Number : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

}  // namespace fusedllm

extern "C" {
// One matrix and its codes. `kernels/native_grouping.py` has the same fields in the same order.
struct fusedllm_grouping {
  void* weights;    // [rows][width] of `number`
  uint8_t* codes;   // [rows][bytes of a row]
  void* scales;     // [rows][groups], float32 if `wide`, else float16
  void* zeros;      // the same, or null
  int64_t rows;
  int64_t width;
  int64_t group;    // weights in a group, a multiple of 32; 0 for whole rows
  int32_t number;
  int32_t bits;     // 3 to 8
  int32_t wide;
  int32_t reserved;
  // Results of encoding: sums over the matrix of squared errors and of squared weights, seconds, and whether a weight
  // was infinite or no number (1), or a scale too large for float16 (2).
  double error;
  double power;
  double seconds;
  int64_t problem;
};

// Quantizes `count` matrices one after the other with all threads. 0, or -1 for fields that make no sense.
int32_t fusedllm_encode(fusedllm_grouping* jobs, int64_t count);
// The other way; `weights` are written.
int32_t fusedllm_decode(fusedllm_grouping* jobs, int64_t count);
}
