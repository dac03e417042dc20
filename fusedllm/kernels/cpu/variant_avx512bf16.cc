// The kernels for AVX-512 with VNNI and products of bfloat16, compiled with those flags.
#include "variant.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace fusedllm {
namespace avx512bf16 {
namespace {
#include "simd_avx512.h"
#include "all_kernels.h"
}  // namespace
}  // namespace avx512bf16

const Kernels* avx512bf16_kernels() { return &avx512bf16::kTable; }
}  // namespace fusedllm
#else
namespace fusedllm {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace fusedllm
#endif
