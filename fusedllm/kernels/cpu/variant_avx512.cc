// The kernels for AVX-512 with VNNI, compiled with those flags.
#include "variant.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace fusedllm {
namespace avx512 {
namespace {
#include "simd_avx512.h"
#include "all_kernels.h"
}  // namespace
}  // namespace avx512

const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace fusedllm
#else
namespace fusedllm {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fusedllm
#endif
