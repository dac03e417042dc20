// `fusedllm_linear`: the products of one array of activations with one or more weight matrices.
#include <algorithm>
#include <array>
#include <cstring>

#include "ffi_support.h"
#include "isa.h"
#include "packing.h"
#include "pool.h"

namespace fusedllm {
namespace {

constexpr int kMostProducts = 8;
// Up to so many tokens plain weights are multiplied as their rows lie, one token after the other.
constexpr int64_t kFewTokens = 8;
// Loops are cut into this many parts for each thread, so that a thread that is interrupted holds up nobody.
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kManyPartsPerThread = 16;
// And tokens, where there are many, into parts of no less than this.
constexpr int64_t kFewestTokens = 48;
// Of a part's weights with many tokens: they stay in a core's second-level cache while all tokens pass.
constexpr int64_t kCachedBytes = 256 * 1024;
// Tokens are quantized by the caller alone up to this many elements, which takes less than waking the others.
constexpr int64_t kFewElements = 16384;

// How the panels of all products, one after the other, and the tokens are cut: into `chunks` of as many panels as can be,
// which may end in one product and begin in another, times `token_parts` of tokens.
struct Cut {
  int64_t panels;
  int64_t chunks;
  int64_t tokens_a_part;
  int64_t token_parts;

  int64_t first_panel(int64_t chunk) const { return panels * chunk / chunks; }
};

Cut cut(int64_t panels, int64_t panel_bytes, int64_t tokens) {
  const int64_t threads = Pool::instance().threads();
  Cut result{panels, std::min(panels, kPartsPerThread * threads), tokens, 1};
  if (tokens > kFewTokens) {
    const int64_t cached = std::max<int64_t>(1, kCachedBytes / panel_bytes);
    result.chunks = std::max(result.chunks, (panels + cached - 1) / cached);
    // Whole blocks of tokens: sixteen is a multiple of every variant's largest.
    const int64_t parts = (kManyPartsPerThread * threads + result.chunks - 1) / result.chunks;
    result.tokens_a_part = std::max<int64_t>(kFewestTokens, ((tokens + parts - 1) / parts + 15) / 16 * 16);
    result.token_parts = (tokens + result.tokens_a_part - 1) / result.tokens_a_part;
  }
  return result;
}

int64_t panels_of(const Product& product) { return (product.rows + kPanelRows - 1) / kPanelRows; }

// The nearest bfloat16, ties to even; a denormal number becomes zero, as the products of bfloat16 have it.
float to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return x;
  bits = magnitude < 0x00800000u ? 0 : (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

class Linear {
 public:
  Linear(const float* x, int64_t tokens, int64_t width, int64_t levels)
      : x_(x), tokens_(tokens), width_(width), levels_(levels) {}

  void add(const Product& product) {
    products_[count_++] = product;
    prepared_for(product) = true;
  }

  void run() {
    prepare();
    int64_t panels = 0, bytes = 0;
    for (int i = 0; i < count_; ++i) {
      const Product& product = products_[i];
      panels += panels_of(product);
      bytes = std::max(bytes, is_packed(product.format) ? panel_bytes(product.format, product.shared, width_)
                                                        : width_ * 4 * kPanelRows);
    }
    const Cut cut = fusedllm::cut(panels, bytes, tokens_);
    Pool::instance().run(cut.chunks * cut.token_parts, [&](int64_t item) {
      const int64_t chunk = item % cut.chunks, part = item / cut.chunks;
      const int64_t first_token = part * cut.tokens_a_part;
      const int64_t last_token = std::min(tokens_, first_token + cut.tokens_a_part);
      int64_t first = cut.first_panel(chunk), last = cut.first_panel(chunk + 1);
      for (int i = 0; i < count_ && last > 0; ++i) {
        const int64_t here = panels_of(products_[i]);
        if (first < here) multiply(products_[i], first, std::min(last, here), first_token, last_token);
        first = std::max<int64_t>(0, first - here);
        last -= here;
      }
    });
  }

 private:
  // Whether any product asks for the activations that this one does.
  bool& prepared_for(const Product& product) {
    if (product.format == Format::kInteger) return integer_;
    if (is_packed(product.format)) return packed_;
    return rounds(product) ? rounded_ : plain_;
  }

  // Whether activations are rounded to bfloat16 for a product; and whether it is then one of pairs.
  bool rounds(const Product& product) const {
    return product.format == Format::kBfloat16 && levels_ == 1 && kernels_.bfloat16_product != nullptr;
  }
  bool pairs(const Product& product) const { return rounds(product) && tokens_ > kFewTokens; }

  // Quantizes or interleaves the activations, as the products ask.
  void prepare() {
    const auto over_tokens = [&](const auto& body) {
      if (tokens_ * width_ <= kFewElements) return body(0, tokens_);
      constexpr int64_t kTokens = 16;
      Pool::instance().run((tokens_ + kTokens - 1) / kTokens, [&](int64_t part) {
        body(part * kTokens, std::min(tokens_, (part + 1) * kTokens));
      });
    };
    if (packed_) {
      const int64_t groups = width_ / kGroup, numbers = tokens_ * groups;
      static thread_local Scratch scratch;
      float* memory = scratch.of<float>(3 * numbers + tokens_ + levels_ * tokens_ * width_ / 4);
      quantized_ = {reinterpret_cast<int8_t*>(memory + 3 * numbers + tokens_),
                    memory,
                    memory + numbers,
                    reinterpret_cast<int32_t*>(memory + 2 * numbers),
                    memory + 3 * numbers,
                    tokens_,
                    groups,
                    levels_};
      over_tokens([&](int64_t first, int64_t last) { kernels_.quantize(x_, first, last, quantized_); });
    }
    if (integer_) {
      static thread_local Scratch scratch;
      float* memory = scratch.of<float>(2 * tokens_ + tokens_ * width_ / 4);
      integers_ = {reinterpret_cast<int8_t*>(memory + 2 * tokens_), memory,
                   reinterpret_cast<int32_t*>(memory + tokens_), tokens_, width_ / kGroup};
      over_tokens([&](int64_t first, int64_t last) { kernels_.quantize_tokens(x_, first, last, integers_); });
    }
    if (plain_ && tokens_ > kFewTokens) {
      static thread_local Scratch scratch;
      interleaved_ = {scratch.of<float>(tokens_ * width_), tokens_, width_};
      over_tokens([&](int64_t first, int64_t last) { kernels_.interleave(x_, first, last, interleaved_); });
    }
    if (rounded_ && tokens_ <= kFewTokens) {
      static thread_local Scratch scratch;
      float* values = scratch.of<float>(tokens_ * width_);
      for (int64_t i = 0; i < tokens_ * width_; ++i) values[i] = to_bfloat16(x_[i]);
      rounded_activations_ = {values, tokens_, width_};
    } else if (rounded_) {
      static thread_local Scratch scratch;
      rounded_activations_ = {scratch.of<float>(tokens_ * ((width_ + 1) / 2)), tokens_, width_};
      over_tokens([&](int64_t first, int64_t last) { kernels_.interleave_pairs(x_, first, last, rounded_activations_); });
    }
  }

  void multiply(const Product& product, int64_t first_panel, int64_t last_panel, int64_t first, int64_t last) const {
    if (product.format == Format::kInteger) {
      kernels_.integer_product(product, integers_, first_panel, last_panel, first, last);
    } else if (is_packed(product.format)) {
      kernels_.packed_product(product, quantized_, first_panel, last_panel, first, last);
    } else if (tokens_ > kFewTokens) {
      static thread_local Scratch scratch;
      float* panel = scratch.of<float>(width_ * kPanelRows);
      if (pairs(product)) {
        kernels_.bfloat16_product(product, rounded_activations_, first_panel, last_panel, first, last, panel);
      } else {
        kernels_.float_product(product, interleaved_, first_panel, last_panel, first, last, panel);
      }
    } else {
      const float* x = rounds(product) ? rounded_activations_.values : x_;
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t row = panel * kPanelRows;
        for (int64_t token = first; token < last; ++token) {
          kernels_.float_vector_product(product, x + token * width_, row, std::min(row + kPanelRows, product.rows),
                                       product.out + token * product.rows);
        }
      }
    }
  }

  const float* x_;
  int64_t tokens_;
  int64_t width_;
  int64_t levels_;
  int count_ = 0;
  bool packed_ = false;
  bool integer_ = false;
  bool plain_ = false;
  bool rounded_ = false;
  std::array<Product, kMostProducts> products_;
  Activations quantized_{};
  IntegerActivations integers_{};
  FloatActivations interleaved_{};
  FloatActivations rounded_activations_{};
  const Kernels& kernels_ = fusedllm::kernels();
};

ffi::Error check_weight(int index, Format format, int64_t shared, const ffi::AnyBuffer& weight, int64_t rows,
                        int64_t width) {
  const std::string name = "linear: weight " + std::to_string(index);
  if (is_packed(format)) {
    const int64_t bytes = fusedllm_packed_bytes(static_cast<int32_t>(format), shared, rows, width);
    if (bytes < 0) {
      return refuse(name +
                    " is packed, so rows must be positive, columns a multiple of 32, and as many of its groups share a "
                    "scale as its format allows.");
    }
    if (weight.element_type() != ffi::U8 || static_cast<int64_t>(weight.element_count()) != bytes) {
      return refuse(name + " must be " + std::to_string(bytes) + " bytes of uint8, as its format packs them.");
    }
    return ffi::Error::Success();
  }
  const ffi::DataType dtype =
      format == Format::kFloat32 ? ffi::F32 : (format == Format::kFloat16 ? ffi::F16 : ffi::BF16);
  if (weight.element_type() != dtype) {
    return refuse(name + " does not have the dtype of its format.");
  }
  if (static_cast<int64_t>(weight.element_count()) != rows * width) {
    return refuse(name + " does not have as many elements as its rows and columns make.");
  }
  return ffi::Error::Success();
}

ffi::Error linear(ffi::AnyBuffer x, ffi::RemainingArgs weights, ffi::RemainingRets results,
                  ffi::Span<const int32_t> formats, ffi::Span<const int64_t> shared, ffi::Span<const int64_t> rows,
                  int32_t levels) try {
  const auto dimensions = x.dimensions();
  if (x.element_type() != ffi::F32 || dimensions.size() != 2) return refuse("linear: x must be float32 [tokens, in].");
  const int64_t tokens = dimensions[0], width = dimensions[1];
  const size_t count = weights.size();
  if (count == 0 || count > kMostProducts || formats.size() != count || shared.size() != count ||
      rows.size() != count || results.size() != count) {
    return refuse("linear: 1 to 8 weights are taken, each with a format, its groups a scale, rows, and a result.");
  }
  if (levels != 1 && levels != 2) return refuse("linear: activations have one or two levels of codes.");
  Linear work(x.typed_data<float>(), tokens, width, levels);
  for (size_t i = 0; i < count; ++i) {
    const auto weight = weights.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (weight.has_error() || result.has_error()) return refuse("linear: an operand can't be read.");
    const int32_t number = formats.begin()[i];
    if (number < 0 || number >= kFormats) return refuse("linear: no format has the number " + std::to_string(number) + ".");
    const Format format = static_cast<Format>(number);
    const int64_t height = rows.begin()[i], groups = shared.begin()[i];
    if (height <= 0 || width <= 0) return refuse("linear: a matrix has rows and columns.");
    constexpr int64_t kMost = int64_t{1} << 30;  // Far above any model's; products of two of them don't overflow.
    if (height > kMost || width > kMost || tokens > kMost) return refuse("linear: sizes must be at most 2^30.");
    ffi::Error error = check_weight(static_cast<int>(i), format, groups, *weight, height, width);
    if (error.failure()) return error;
    ffi::AnyBuffer out = **result;
    if (out.element_type() != ffi::F32 || static_cast<int64_t>(out.element_count()) != tokens * height) {
      return refuse("linear: result " + std::to_string(i) + " must be float32 [tokens, rows].");
    }
    const auto* bytes = static_cast<const uint8_t*>(weight->untyped_data());
    work.add({bytes, format, groups, height, width, out.typed_data<float>()});
  }
  if (tokens > 0) work.run();
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: linear: no memory for the activations.");
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_linear, fusedllm::linear,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int32_t>>("formats")
                                  .Attr<xla::ffi::Span<const int64_t>>("shared")
                                  .Attr<xla::ffi::Span<const int64_t>>("rows")
                                  .Attr<int32_t>("levels"));
