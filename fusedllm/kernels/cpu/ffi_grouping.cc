// `fusedllm_quantize` and `fusedllm_dequantize`: matrices into grouped codes and back, inside a program.
#include <optional>

#include "ffi_support.h"
#include "grouping.h"

namespace fusedllm {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 40;

std::optional<int32_t> number_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return static_cast<int32_t>(Number::kFloat32);
    case ffi::F16: return static_cast<int32_t>(Number::kFloat16);
    case ffi::BF16: return static_cast<int32_t>(Number::kBfloat16);
    default: return std::nullopt;
  }
}

bool is_matrix(const ffi::AnyBuffer& buffer, int64_t rows, int64_t columns) {
  return buffer.dimensions().size() == 2 && buffer.dimensions()[0] == rows && buffer.dimensions()[1] == columns;
}

// Fills in the job of one matrix and its codes, or says what does not fit. `operands` are codes, scales, and zeros.
std::optional<ffi::Error> describe(const ffi::AnyBuffer& weights, const ffi::AnyBuffer* const operands[3],
                                   int64_t group, int32_t bits, fusedllm_grouping* job) {
  const auto dimensions = weights.dimensions();
  const std::optional<int32_t> number = number_of(weights.element_type());
  if (dimensions.size() != 2 || dimensions[0] < 1 || dimensions[1] < 1 || !number ||
      static_cast<int64_t>(weights.element_count()) > kMostElements) {
    return refuse("grouped codes are of matrices of float32, float16 or bfloat16.");
  }
  if (bits < 3 || bits > 8 || group < 0 || group % 32 != 0 || group > 4096) {
    return refuse("grouped codes have 3 to 8 bits, and groups that are a multiple of 32 up to 4096.");
  }
  const int64_t rows = dimensions[0], width = dimensions[1];
  const int64_t unit = group == 0 ? (bits == 8 ? 1 : 8) : group;
  const int64_t bytes = (width + unit - 1) / unit * unit * bits / 8;
  const int64_t groups = group == 0 ? 1 : (width + group - 1) / group;
  const ffi::DataType kind = operands[1]->element_type();
  if (operands[0]->element_type() != ffi::U8 || !is_matrix(*operands[0], rows, bytes)) {
    return refuse("codes must be uint8 [rows, bytes of a row].");
  }
  if ((kind != ffi::F16 && kind != ffi::F32) || !is_matrix(*operands[1], rows, groups)) {
    return refuse("scales must be float16 or float32 [rows, groups].");
  }
  if (operands[2] != nullptr && (operands[2]->element_type() != kind || !is_matrix(*operands[2], rows, groups))) {
    return refuse("zero points must be like the scales.");
  }
  *job = {};
  job->weights = weights.untyped_data();
  job->codes = static_cast<uint8_t*>(operands[0]->untyped_data());
  job->scales = operands[1]->untyped_data();
  job->zeros = operands[2] == nullptr ? nullptr : operands[2]->untyped_data();
  job->rows = rows;
  job->width = width;
  job->group = group;
  job->number = *number;
  job->bits = bits;
  job->wide = kind == ffi::F32;
  return std::nullopt;
}

ffi::Error finished(int32_t result) {
  if (result == 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: there is no memory for the quantizer's scratch.");
}

ffi::Error quantize(ffi::AnyBuffer weights, ffi::RemainingRets results, int64_t group, int32_t bits) {
  auto codes = results.get<ffi::AnyBuffer>(0), scales = results.get<ffi::AnyBuffer>(1);
  auto zeros = results.get<ffi::AnyBuffer>(results.size() == 3 ? 2 : 1);
  if ((results.size() != 2 && results.size() != 3) || !codes || !scales || !zeros) {
    return refuse("quantize: codes and scales are made, and zero points if they are asked for.");
  }
  const ffi::AnyBuffer* const made[3] = {&**codes, &**scales, results.size() == 3 ? &**zeros : nullptr};
  fusedllm_grouping job;
  if (const auto problem = describe(weights, made, group, bits, &job)) return *problem;
  return finished(fusedllm_encode(&job, 1));
}

ffi::Error dequantize(ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> weights, int64_t group, int32_t bits) {
  const auto codes = operands.get<ffi::AnyBuffer>(0), scales = operands.get<ffi::AnyBuffer>(1);
  const auto zeros = operands.get<ffi::AnyBuffer>(operands.size() == 3 ? 2 : 1);
  if ((operands.size() != 2 && operands.size() != 3) || !codes || !scales || !zeros) {
    return refuse("dequantize: codes and scales are taken, and zero points if there are any.");
  }
  const ffi::AnyBuffer* const read[3] = {&*codes, &*scales, operands.size() == 3 ? &*zeros : nullptr};
  fusedllm_grouping job;
  if (const auto problem = describe(*weights, read, group, bits, &job)) return *problem;
  return finished(fusedllm_decode(&job, 1));
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fusedllm_quantize, fusedllm::quantize,
    xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().RemainingRets().Attr<int64_t>("group").Attr<int32_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fusedllm_dequantize, fusedllm::dequantize,
    xla::ffi::Ffi::Bind().RemainingArgs().Ret<xla::ffi::AnyBuffer>().Attr<int64_t>("group").Attr<int32_t>("bits"));
