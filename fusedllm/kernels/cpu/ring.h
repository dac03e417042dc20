// Arithmetic of masked products (`partition/ring.py`) on memory of the host: `kernels/native_ring.py` calls it.
#pragma once

#include <cstdint>

namespace fusedllm {

// out[tokens][rows] = x[tokens][width] times weight[rows][width] transposed, modulo 2^32, with all threads. `wipe`
// overwrites what it has kept of x. Throws std::bad_alloc.
void ring_product(const int32_t* x, const int8_t* weight, int64_t tokens, int64_t width, int64_t rows, bool wipe,
                  int32_t* out);

}  // namespace fusedllm

// All return 0, or -1 for sizes that make no sense, or -2 where memory is short.
extern "C" {
// The product; nothing of x is left behind.
int32_t fusedllm_ring_product(const int32_t* x, const int8_t* weight, int64_t tokens, int64_t width, int64_t rows,
                              int32_t* out);
// x as codes of eight bits with one scale a token, as they are (`codes`, or null) and with pads added (`masked`, or null;
// pads, or null for none). Rows are turned first (`Kernels::turn`) in blocks of `block` elements, or not where that is 0.
int32_t fusedllm_ring_encode(const float* x, const int32_t* pads, int64_t tokens, int64_t width, int64_t block,
                             int32_t* masked, int8_t* codes, float* scales);
// Sums less pads (or null), as they are (`integers`, or null) and scaled (`out`, or null). 1 where a magnitude is above
// `bound`.
int32_t fusedllm_ring_decode(const int32_t* sums, const int32_t* pads, const float* token_scales,
                             const float* output_scales, int64_t tokens, int64_t width, int32_t bound,
                             int32_t* integers, float* out);
// residues[tokens][rounds] of x[tokens][width] times secrets[rounds][width] modulo 2^31 - 1; x is int32, or int8 if
// `codes`.
int32_t fusedllm_ring_residues(const void* x, int32_t codes, const uint32_t* secrets, int64_t rounds, int64_t tokens,
                               int64_t width, uint32_t* residues);
// out[rounds][width] of secrets[rounds][rows] times weight[rows][width] modulo 2^31 - 1.
int32_t fusedllm_ring_weigh(const int8_t* weight, const uint32_t* secrets, int64_t rounds, int64_t rows, int64_t width,
                            uint32_t* out);
// The largest sum of magnitudes of a row of weight[rows][width].
int32_t fusedllm_ring_largest_row(const int8_t* weight, int64_t rows, int64_t width, int64_t* largest);
}
