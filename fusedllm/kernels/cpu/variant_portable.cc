// The kernels in portable C++, for every processor.
#include "variant.h"

#include <cmath>

namespace fusedllm {
namespace portable {
namespace {
#include "simd_portable.h"
#include "all_kernels.h"
}  // namespace
}  // namespace portable

const Kernels* portable_kernels() { return &portable::kTable; }
}  // namespace fusedllm
