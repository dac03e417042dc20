// `fusedllm_embed`: rows of a packed embedding, decoded.
#include <algorithm>
#include <cstring>

#include "ffi_support.h"
#include "packing.h"
#include "pool.h"

namespace fusedllm {
namespace {

// Below this many rows the caller decodes them alone.
constexpr int64_t kFewRows = 8;

ffi::Error embed(ffi::AnyBuffer tokens, ffi::AnyBuffer table, ffi::Result<ffi::AnyBuffer> result, int32_t format,
                 int64_t shared, int64_t rows) {
  const auto dimensions = result->dimensions();
  if (tokens.element_type() != ffi::S32) return refuse("embed: token ids must be int32.");
  if (result->element_type() != ffi::F32 || dimensions.size() != 2 ||
      dimensions[0] != static_cast<int64_t>(tokens.element_count())) {
    return refuse("embed: the result must be float32 [tokens, width].");
  }
  const int64_t count = dimensions[0], width = dimensions[1];
  const int64_t bytes = fusedllm_packed_bytes(format, shared, rows, width);
  if (bytes < 0 || table.element_type() != ffi::U8 || static_cast<int64_t>(table.element_count()) != bytes) {
    return refuse("embed: the table must be uint8 of as many bytes as its format, rows and columns make.");
  }
  const int32_t* ids = tokens.typed_data<int32_t>();
  const uint8_t* packed = static_cast<const uint8_t*>(table.untyped_data());
  float* out = result->typed_data<float>();
  const auto decode = [&](int64_t i) {
    const int64_t row = std::clamp<int64_t>(ids[i], 0, rows - 1);
    unpack_row(static_cast<Format>(format), shared, width, packed, row, out + i * width);
  };
  if (count < kFewRows) {
    for (int64_t i = 0; i < count; ++i) decode(i);
  } else {
    Pool::instance().run(count, decode);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_embed, fusedllm::embed,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("format")
                              .Attr<int64_t>("shared")
                                  .Attr<int64_t>("rows"));
