// `fusedllm_draw`: the next token of each row of logits, filters included. `kernels/draw.py` says what they mean.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ffi_support.h"
#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

// As many likeliest tokens decide alone where they can.
constexpr int64_t kCandidates = 64;
// Tokens above the threshold that are kept before the least likely of them are dropped.
constexpr int kKept = 512;
// A row is summed in stretches of so many tokens before one token inside a stretch is chosen.
constexpr int64_t kStretch = 256;
// Bins of a row's mass by distance from the likeliest, and how many there are to one power of e; the last holds the rest.
constexpr int kBins = 1024;
constexpr float kBinsPerNat = 32;

struct Filters {
  float temperature;
  int64_t top_k;
  float top_p;
  float min_p;
};

class Row {
 public:
  Row(const Kernels& kernels, const float* logits, int64_t size, const Filters& filters)
      : kernels_(kernels), logits_(logits), size_(size), filters_(filters) {}

  int32_t draw(float uniform) {
    largest_ = kernels_.largest_of(logits_, size_);
    if (!(filters_.temperature > 0)) return first_largest();
    static thread_local Scratch scratch;
    mass_ = scratch.of<float>(size_);
    whole_ = kernels_.exponentials_of(logits_, size_, largest_, 1 / filters_.temperature, mass_);
    // Logits that are infinite or no number: there are no probabilities.
    if (!(whole_ > 0 && whole_ <= std::numeric_limits<float>::max())) return first_largest();
    count_ = static_cast<int>(std::min(kCandidates, size_));
    find_likeliest(count_);
    const int stay = staying_candidates();
    const bool decided = size_ <= kCandidates || (stay < count_ && !(has_top_k() && filters_.top_k > count_));
    return decided ? draw_candidate(stay, uniform) : draw_from_row(uniform);
  }

 private:
  int32_t first_largest() const {
    const float* first = std::find(logits_, logits_ + size_, largest_);
    return first == logits_ + size_ ? 0 : static_cast<int32_t>(first - logits_);
  }

  bool has_top_k() const { return filters_.top_k > 0 && filters_.top_k < size_; }
  float scaled(int32_t id) const { return (logits_[id] - largest_) / filters_.temperature; }

  // Puts the `wanted` likeliest tokens in order into `likeliest_`; of equal logits the lower id is the likelier one.
  void find_likeliest(int64_t wanted) {
    int count = 0;
    float threshold = -std::numeric_limits<float>::infinity();
    const auto likelier = [this](int32_t a, int32_t b) {
      return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
    };
    for (int64_t at = 0; at < size_;) {
      at = kernels_.collect_above(logits_, at, size_, threshold, likeliest_.data(), &count, kKept);
      if (count > wanted) {
        std::nth_element(likeliest_.begin(), likeliest_.begin() + wanted - 1, likeliest_.begin() + count, likelier);
        count = static_cast<int>(wanted);
        threshold = logits_[likeliest_[wanted - 1]];
      }
    }
    std::sort(likeliest_.begin(), likeliest_.begin() + count, likelier);
    // A token of minus infinity is not found, and can't be drawn.
    count_ = std::max(count, 1);
    if (count == 0) likeliest_[0] = 0;
  }

  // How many of the candidates stay: a first part of them, as every filter is a threshold.
  int staying_candidates() const {
    int limit = count_;
    const bool in_top_k = filters_.top_k > 0 && filters_.top_k <= count_;
    if (in_top_k) {
      limit = static_cast<int>(filters_.top_k);
      while (limit < count_ && logits_[likeliest_[limit]] == logits_[likeliest_[limit - 1]]) ++limit;
    }
    float total = whole_;
    if (in_top_k) {
      total = 0;
      for (int i = 0; i < limit; ++i) total += mass_[likeliest_[i]];
    }
    const float least = std::log(filters_.min_p);
    float before = 0, until_here = 0;
    for (int i = 0; i < limit; ++i) {
      // Equal logits share one fate: what is likelier than the first of them decides.
      if (i == 0 || logits_[likeliest_[i]] != logits_[likeliest_[i - 1]]) before = until_here;
      until_here += mass_[likeliest_[i]];
      const bool inside = filters_.top_p >= 1 || before < filters_.top_p * total;
      if (i > 0 && !(inside && scaled(likeliest_[i]) >= least)) return i;
    }
    return limit;
  }

  int32_t draw_candidate(int stay, float uniform) const {
    float total = 0;
    for (int i = 0; i < stay; ++i) total += mass_[likeliest_[i]];
    float until_here = 0;
    for (int i = 0; i < stay; ++i) {
      until_here += mass_[likeliest_[i]];
      if (until_here > uniform * total) return likeliest_[i];
    }
    return likeliest_[stay - 1];
  }

  int32_t draw_from_row(float uniform) const {
    float threshold = -std::numeric_limits<float>::infinity();
    float total = whole_;
    if (has_top_k()) {
      threshold = kth_largest();
      total = kernels_.mass_from(logits_, mass_, size_, threshold);
    }
    if (filters_.top_p < 1) threshold = std::max(threshold, nucleus(threshold, total));
    threshold = std::max(threshold, largest_ + filters_.temperature * std::log(filters_.min_p));
    threshold = std::min(threshold, largest_);
    return inverse_cdf(threshold, uniform);
  }

  float kth_largest() const {
    static thread_local Scratch scratch;
    float* copy = scratch.of<float>(size_);
    std::copy(logits_, logits_ + size_, copy);
    float* kth = copy + filters_.top_k - 1;
    std::nth_element(copy, kth, copy + size_, [](float a, float b) { return a > b; });
    return *kth;
  }

  // The least logit that stays: all strictly likelier tokens together hold less than top_p of `total`.
  float nucleus(float threshold, float total) const {
    const float goal = filters_.top_p * total, factor = kBinsPerNat / filters_.temperature;
    const auto bin_of = [&](int64_t i) {
      const float distance = (largest_ - logits_[i]) * factor;
      return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
    };
    std::array<double, kBins> bins{};
    for (int64_t i = 0; i < size_; ++i) {
      if (logits_[i] >= threshold) bins[static_cast<size_t>(bin_of(i))] += mass_[i];
    }
    int crossing = 0;
    double before = 0;
    while (crossing < kBins - 1 && before + bins[static_cast<size_t>(crossing)] < goal) {
      before += bins[static_cast<size_t>(crossing++)];
    }
    static thread_local Scratch scratch;
    int32_t* inside = scratch.of<int32_t>(size_);
    int64_t count = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (logits_[i] >= threshold && bin_of(i) == crossing) inside[count++] = static_cast<int32_t>(i);
    }
    std::sort(inside, inside + count, [this](int32_t a, int32_t b) { return logits_[a] > logits_[b]; });
    float least = largest_;
    for (int64_t i = 0; i < count && before < goal; ++i) {
      least = logits_[inside[i]];
      // All that are equal stay, and are counted before the next.
      before += mass_[inside[i]];
    }
    return least;
  }

  // The token at which the running sum of the mass from `threshold` up passes `uniform` of the whole.
  int32_t inverse_cdf(float threshold, float uniform) const {
    const int64_t stretches = (size_ + kStretch - 1) / kStretch;
    static thread_local Scratch scratch;
    float* sums = scratch.of<float>(stretches);
    double total = 0;
    for (int64_t s = 0; s < stretches; ++s) {
      const int64_t at = s * kStretch;
      sums[s] = kernels_.mass_from(logits_ + at, mass_ + at, std::min(kStretch, size_ - at), threshold);
      total += sums[s];
    }
    const double target = uniform * total;
    double until_here = 0;
    int32_t last = likeliest_[0];
    for (int64_t s = 0; s < stretches; ++s) {
      if (until_here + sums[s] <= target && s + 1 < stretches) {
        until_here += sums[s];
        continue;
      }
      for (int64_t i = s * kStretch; i < std::min(size_, (s + 1) * kStretch); ++i) {
        if (!(logits_[i] >= threshold) || !(mass_[i] > 0)) continue;
        until_here += mass_[i];
        last = static_cast<int32_t>(i);
        if (until_here > target) return last;
      }
    }
    return last;  // Rounding has left none above the target.
  }

  const Kernels& kernels_;
  const float* logits_;
  int64_t size_;
  Filters filters_;
  float largest_ = 0;
  float whole_ = 0;
  float* mass_ = nullptr;
  int count_ = 0;
  std::array<int32_t, kKept> likeliest_;
};

bool is_row(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t batch) {
  return buffer.element_type() == type && static_cast<int64_t>(buffer.element_count()) == batch;
}

ffi::Error draw(ffi::AnyBuffer logits, ffi::AnyBuffer temperature, ffi::AnyBuffer top_k, ffi::AnyBuffer top_p,
                ffi::AnyBuffer min_p, ffi::AnyBuffer uniform, ffi::Result<ffi::AnyBuffer> tokens) try {
  const auto dimensions = logits.dimensions();
  if (logits.element_type() != ffi::F32 || dimensions.size() != 2 || dimensions[1] < 1 ||
      dimensions[1] > std::numeric_limits<int32_t>::max()) {
    return refuse("draw: logits must be float32 [batch, vocab].");
  }
  const int64_t batch = dimensions[0], size = dimensions[1];
  if (!is_row(temperature, ffi::F32, batch) || !is_row(top_k, ffi::S32, batch) || !is_row(top_p, ffi::F32, batch) ||
      !is_row(min_p, ffi::F32, batch) || !is_row(uniform, ffi::F32, batch) || !is_row(*tokens, ffi::S32, batch)) {
    return refuse("draw: temperature, top_p, min_p and uniform must be float32 [batch], top_k and the result int32.");
  }
  const Kernels& kernels = fusedllm::kernels();
  Pool::instance().run(batch, [&](int64_t i) {
    const Filters filters{temperature.typed_data<float>()[i], top_k.typed_data<int32_t>()[i],
                          top_p.typed_data<float>()[i], min_p.typed_data<float>()[i]};
    Row row(kernels, logits.typed_data<float>() + i * size, size, filters);
    tokens->typed_data<int32_t>()[i] = row.draw(uniform.typed_data<float>()[i]);
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: draw: no memory for the probabilities.");
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_draw, fusedllm::draw,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
