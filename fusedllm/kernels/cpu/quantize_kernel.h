// Activations into blocks of tokens: quantized to eight bits in groups of 32, or plain. Included by all_kernels.h.

int64_t token_block(int64_t remaining) {
  int64_t size = kMostTokens;
  while (size > remaining) size /= 2;
  return size;
}

// Magnitudes from which on an element counts as infinite, and below which its group counts as zero: between them the
// exponents of all scales, of their products with those of weights and of a group's sum are those of normal numbers.
constexpr float kLargest = 0x1p122f, kSmallest = 0x1p-88f;

// What one group of one token becomes. A group that holds what is infinite or no number is all zeros.
struct Group {
  float scale;
  int32_t sum;  // of its codes
  bool finite;
};

// `second` is the place of the second level's codes, or nullptr.
inline Group quantize_group(const float* x, int8_t* codes, int8_t* second) {
  const Floats low = load(x), high = load(x + 16);
  const int32_t bits = largest(larger_magnitude(larger_magnitude(int_zeros(), low), high));
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  const bool finite = magnitude < kLargest;
  if (!finite || magnitude < kSmallest) {
    __builtin_memset(codes, 0, kGroup);
    if (second != nullptr) __builtin_memset(second, 0, kGroup);
    // A scale of one, as a kernel may add its exponent to that of a weight's: zero has none.
    return {1.0f, 0, finite};
  }
  if (second == nullptr) {
    const Floats inverse = broadcast(127.0f / magnitude);
    const Ints first_low = to_ints(multiply(low, inverse)), first_high = to_ints(multiply(high, inverse));
    store_int8(codes, first_low);
    store_int8(codes + 16, first_high);
    return {magnitude / 127.0f, sum(add(first_low, first_high)), true};
  }
  // The least power of two that no element is more than 127 * 256 + 127 of.
  const float enlarged = magnitude * (32768.0f / 32639.0f);
  int32_t exponent;
  __builtin_memcpy(&exponent, &enlarged, sizeof exponent);
  exponent = (exponent >> 23) - 14;
  const int32_t scale_bits = exponent << 23, inverse_bits = (254 - exponent) << 23;
  float scale, inverse;
  __builtin_memcpy(&scale, &scale_bits, sizeof scale);
  __builtin_memcpy(&inverse, &inverse_bits, sizeof inverse);
  int32_t total = 0;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Ints code = to_ints(multiply(half == 0 ? low : high, broadcast(inverse)));
    // The nearest multiple of 256, and what is left: -128 to 127, of which -128 is left to its neighbour.
    const Ints first = shift_right<8>(add(code, broadcast_int(128)));
    const Ints rest = maximum(subtract(code, shift_left<8>(first)), broadcast_int(-127));
    store_int8(codes + 16 * half, first);
    store_int8(second + 16 * half, rest);
    total += sum(add(shift_left<8>(first), rest));
  }
  return {scale, total, true};
}

void quantize(const float* x, int64_t begin, int64_t last, const Activations& to) {
  const int64_t width = to.groups * kGroup;
  for (int64_t token = begin; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    int8_t* codes = to.codes + token * width * to.levels;
    const int64_t numbers = token * to.groups;
    for (int64_t inside = 0; inside < count; ++inside) {
      const float* row = x + (token + inside) * width;
      bool finite = true;
      for (int64_t group = 0; group < to.groups; ++group) {
        int8_t* first = codes + (group * to.levels * count + inside) * kGroup;
        int8_t* second = to.levels == 2 ? first + count * kGroup : nullptr;
        const Group made = quantize_group(row + group * kGroup, first, second);
        const int64_t at = numbers + group * count + inside;
        to.scales[at] = made.scale;
        to.sums[at] = made.scale * static_cast<float>(made.sum);
        to.corrections[at] = -8 * made.sum;
        finite = finite && made.finite;
      }
      to.starts[token + inside] = finite ? 0.0f : __builtin_nanf("");
    }
    token += count;
  }
}

void interleave(const float* x, int64_t first, int64_t last, const FloatActivations& to) {
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    float* block = to.values + token * to.width;
    for (int64_t inside = 0; inside < count; ++inside) {
      const float* row = x + (token + inside) * to.width;
      for (int64_t k = 0; k < to.width; ++k) block[k * count + inside] = row[k];
    }
    token += count;
  }
}
