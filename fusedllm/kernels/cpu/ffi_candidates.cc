// `fusedllm_candidates`: of each row of logits the likeliest tokens, and the sum that makes their probabilities.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ffi_support.h"
#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

constexpr int64_t kMostCandidates = 128;
// Tokens above the threshold that are kept before the least likely of them are dropped.
constexpr int kKept = 512;
constexpr int32_t kNobody = -1;

void likeliest(const Kernels& kernels, const float* row, int64_t size, int64_t wanted, int32_t* ids) {
  int32_t found[kKept];
  int count = 0;
  float threshold = -std::numeric_limits<float>::infinity();
  // Of equal logits the lower id is the likelier one. A token of minus infinity is never found.
  const auto likelier = [row](int32_t a, int32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; };
  for (int64_t at = 0; at < size;) {
    at = kernels.collect_above(row, at, size, threshold, found, &count, kKept);
    if (count > wanted) {
      std::nth_element(found, found + wanted - 1, found + count, likelier);
      count = static_cast<int>(wanted);
      threshold = row[found[wanted - 1]];
    }
  }
  std::sort(found, found + count, likelier);
  std::copy(found, found + count, ids);
  std::fill(ids + count, ids + wanted, kNobody);
}

void candidates_of(const Kernels& kernels, const float* row, int64_t size, float temperature, int64_t wanted,
                   float* values, int32_t* ids, float* total) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float largest = kernels.largest_of(row, size);
  if (!(temperature > 0)) {
    const float* first = std::find(row, row + size, largest);
    std::fill(values, values + wanted, -infinity);
    std::fill(ids, ids + wanted, 0);
    values[0] = 0;
    ids[0] = first == row + size ? 0 : static_cast<int32_t>(first - row);
    *total = 1;
    return;
  }
  likeliest(kernels, row, size, wanted, ids);
  for (int64_t i = 0; i < wanted; ++i) {
    values[i] = ids[i] < 0 ? -infinity : (row[ids[i]] - largest) / temperature;
    ids[i] = std::max(ids[i], 0);
  }
  *total = kernels.sum_of_exponentials(row, size, largest, 1 / temperature);
}

ffi::Error candidates(ffi::AnyBuffer logits, ffi::AnyBuffer temperature, ffi::Result<ffi::AnyBuffer> values,
                      ffi::Result<ffi::AnyBuffer> ids, ffi::Result<ffi::AnyBuffer> totals) {
  const auto dimensions = logits.dimensions();
  if (logits.element_type() != ffi::F32 || dimensions.size() != 2) {
    return refuse("candidates: logits must be float32 [batch, vocab].");
  }
  const int64_t batch = dimensions[0], size = dimensions[1];
  if (temperature.element_type() != ffi::F32 || static_cast<int64_t>(temperature.element_count()) != batch) {
    return refuse("candidates: temperature must be float32 [batch].");
  }
  const auto shape = values->dimensions();
  const int64_t wanted = shape.size() == 2 ? shape[1] : 0;
  if (wanted < 1 || wanted > std::min(kMostCandidates, size) || shape[0] != batch) {
    return refuse("candidates: 1 to 128 of each row are found, and no more than it has.");
  }
  if (values->element_type() != ffi::F32 || ids->element_type() != ffi::S32 || totals->element_type() != ffi::F32 ||
      ids->element_count() != values->element_count() || static_cast<int64_t>(totals->element_count()) != batch) {
    return refuse("candidates: results are float32 and int32 [batch, candidates] and float32 [batch].");
  }
  const Kernels& kernels = fusedllm::kernels();
  Pool::instance().run(batch, [&](int64_t i) {
    candidates_of(kernels, logits.typed_data<float>() + i * size, size, temperature.typed_data<float>()[i], wanted,
                  values->typed_data<float>() + i * wanted, ids->typed_data<int32_t>() + i * wanted,
                  totals->typed_data<float>() + i);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_candidates, fusedllm::candidates,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
