// `fusedllm_rms_norm`, `fusedllm_swiglu` and `fusedllm_hadamard`: what lies between two products, row by row.
#include <algorithm>

#include "ffi_support.h"
#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

// Elements of a part of the work; a caller with fewer does all of it alone.
constexpr int64_t kPart = 16384;

bool is_float(const ffi::AnyBuffer& buffer, int64_t elements) {
  return buffer.element_type() == ffi::F32 && static_cast<int64_t>(buffer.element_count()) == elements;
}

bool same_shape(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// With a delta: x, delta, weight -> x + delta, its norm. Without: x, weight -> the norm.
ffi::Error rms_norm(ffi::RemainingArgs operands, ffi::RemainingRets results, float epsilon) {
  const bool adds = operands.size() == 3;
  if (operands.size() != results.size() + 1 || (operands.size() != 2 && !adds)) {
    return refuse("rms_norm: x and a weight are taken for one result, or with a delta for two.");
  }
  const auto x = operands.get<ffi::AnyBuffer>(0), weight = operands.get<ffi::AnyBuffer>(adds ? 2 : 1);
  const auto delta = operands.get<ffi::AnyBuffer>(adds ? 1 : 0);
  auto total = results.get<ffi::AnyBuffer>(0), normed = results.get<ffi::AnyBuffer>(adds ? 1 : 0);
  if (!x || !weight || !delta || !total || !normed) return refuse("rms_norm: an operand can't be read.");
  const int64_t width = static_cast<int64_t>(weight->element_count());
  const int64_t elements = static_cast<int64_t>(x->element_count());
  if (x->dimensions().size() == 0 || x->dimensions().back() != width || weight->dimensions().size() != 1 ||
      (adds && !same_shape(*delta, *x))) {
    return refuse("rms_norm: the weight must be [width] for x of [..., width], and the delta have x's shape.");
  }
  if (width < 1 || elements % width != 0 || !is_float(*weight, width) || !is_float(*x, elements) ||
      !is_float(*delta, elements) || !is_float(**total, elements) || !is_float(**normed, elements)) {
    return refuse("rms_norm: x, delta and results must be float32 of one shape, [..., width], the weight [width].");
  }
  const Kernels& kernels = fusedllm::kernels();
  const int64_t rows = elements / width, part = std::max<int64_t>(1, kPart / width);
  Pool::instance().run((rows + part - 1) / part, [&](int64_t item) {
    kernels.norm_rows(x->typed_data<float>(), adds ? delta->typed_data<float>() : nullptr,
                      weight->typed_data<float>(), epsilon, width, item * part, std::min(rows, (item + 1) * part),
                      (*total)->typed_data<float>(), (*normed)->typed_data<float>());
  });
  return ffi::Error::Success();
}

ffi::Error swiglu(ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t elements = static_cast<int64_t>(gate.element_count());
  if (!same_shape(gate, up) || !is_float(gate, elements) || !is_float(up, elements) || !is_float(*out, elements)) {
    return refuse("swiglu: gate, up and the result must be float32 of one shape.");
  }
  const Kernels& kernels = fusedllm::kernels();
  Pool::instance().run((elements + kPart - 1) / kPart, [&](int64_t item) {
    kernels.swiglu(gate.typed_data<float>(), up.typed_data<float>(), item * kPart,
                   std::min(elements, (item + 1) * kPart), out->typed_data<float>());
  });
  return ffi::Error::Success();
}

ffi::Error hadamard(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, int64_t block) try {
  const int64_t elements = static_cast<int64_t>(x.element_count());
  if (x.dimensions().size() == 0 || !same_shape(x, *out) || !is_float(x, elements) || !is_float(*out, elements)) {
    return refuse("hadamard: x and the result must be float32 of one shape, [..., width].");
  }
  const int64_t width = x.dimensions().back();
  if (block < 1 || (block & (block - 1)) != 0 || width % block != 0) {
    return refuse("hadamard: a block is a power of two that divides the width.");
  }
  if (elements == 0) return ffi::Error::Success();
  const Kernels& kernels = fusedllm::kernels();
  const int64_t rows = elements / width, part = std::max<int64_t>(1, kPart / width);
  Pool::instance().run((rows + part - 1) / part, [&](int64_t item) {
    static thread_local Scratch scratch;
    float* memory = scratch.of<float>(block);
    for (int64_t row = item * part; row < std::min(rows, (item + 1) * part); ++row) {
      kernels.turn(x.typed_data<float>() + row * width, width, block, memory, out->typed_data<float>() + row * width);
    }
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: hadamard: no memory for a block.");
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_rms_norm, fusedllm::rms_norm,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_swiglu, fusedllm::swiglu,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_hadamard, fusedllm::hadamard,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("block"));
