// `fusedllm_ring_linear`: the product modulo 2^32 of int32 with int8, inside a program.
#include "ffi_support.h"
#include "ring.h"

namespace fusedllm {
namespace {

ffi::Error ring_linear(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> out) try {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto left = x.dimensions(), right = weight.dimensions(), made = out->dimensions();
  if (x.element_type() != ffi::S32 || weight.element_type() != ffi::S8 || out->element_type() != ffi::S32) {
    return refuse("ring_linear: x and the result are int32, the weight is int8.");
  }
  if (left.size() != 2 || right.size() != 2 || made.size() != 2 || left[1] != right[1] || made[0] != left[0] ||
      made[1] != right[0]) {
    return refuse("ring_linear: x must be [tokens, in], the weight [out, in], and the result [tokens, out].");
  }
  if (right[0] < 1 || right[1] < 1 || left[0] > kMost || right[0] > kMost || right[1] > kMost) {
    return refuse("ring_linear: a matrix has rows and columns, and sizes must be at most 2^30.");
  }
  // What comes here may be seen by everybody, and is not overwritten.
  ring_product(x.typed_data<int32_t>(), weight.typed_data<int8_t>(), left[0], right[1], right[0], false,
               out->typed_data<int32_t>());
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: ring_linear: no memory for the activations.");
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_ring_linear, fusedllm::ring_linear,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
