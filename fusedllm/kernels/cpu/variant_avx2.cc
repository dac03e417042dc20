// The kernels for AVX2 with FMA and F16C, compiled with those flags.
#include "variant.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace fusedllm {
namespace avx2 {
namespace {
#include "simd_avx2.h"
#include "all_kernels.h"
}  // namespace
}  // namespace avx2

const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace fusedllm
#else
namespace fusedllm {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fusedllm
#endif
