// Activations into blocks of tokens: quantized to eight bits in groups of 32, or plain. Included by all_kernels.h.

int64_t token_block(int64_t remaining) {
  int64_t size = kMostTokens;
  while (size > remaining) size /= 2;
  return size;
}

// One group of one token: codes, scale, and the sum of what the codes stand for. `second` is the place of the second
// level's codes, or nullptr.
inline void quantize_group(const float* x, int8_t* codes, int8_t* second, float* scale, float* total) {
  const Floats low = load(x), high = load(x + 16);
  const int32_t bits = largest(larger_magnitude(larger_magnitude(int_zeros(), low), high));
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  if (!(magnitude <= 3.402823466e38f)) {
    // Infinity or no number: so is then every product with this group, as it would be without quantization.
    __builtin_memset(codes, 0, kGroup);
    if (second != nullptr) __builtin_memset(second, 0, kGroup);
    *scale = *total = __builtin_nanf("");
    return;
  }
  // Below this a code's inverse scale would overflow. Such a group is zero beside any other.
  const bool vanishes = magnitude < 1e-30f;
  const Floats inverse = broadcast(vanishes ? 0.0f : 127.0f / magnitude);
  const Floats scaled_low = multiply(low, inverse), scaled_high = multiply(high, inverse);
  const Ints first_low = to_ints(scaled_low), first_high = to_ints(scaled_high);
  store_int8(codes, first_low);
  store_int8(codes + 16, first_high);
  *scale = vanishes ? 0.0f : magnitude / 127.0f;
  float sum_of_codes = static_cast<float>(sum(add(first_low, first_high)));
  if (second != nullptr) {
    const Floats steps = broadcast(1.0f / kSecondStep);
    const Ints rest_low = to_ints(multiply(subtract(scaled_low, to_floats(first_low)), steps));
    const Ints rest_high = to_ints(multiply(subtract(scaled_high, to_floats(first_high)), steps));
    store_int8(second, rest_low);
    store_int8(second + 16, rest_high);
    sum_of_codes += static_cast<float>(sum(add(rest_low, rest_high))) * kSecondStep;
  }
  *total = *scale * sum_of_codes;
}

void quantize(const float* x, int64_t begin, int64_t last, const Activations& to) {
  const int64_t width = to.groups * kGroup;
  for (int64_t token = begin; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    int8_t* codes = to.codes + token * width * to.levels;
    float* scales = to.scales + token * to.groups;
    float* sums = to.sums + token * to.groups;
    for (int64_t inside = 0; inside < count; ++inside) {
      const float* row = x + (token + inside) * width;
      for (int64_t group = 0; group < to.groups; ++group) {
        const int64_t at = group * count + inside;
        int8_t* first = codes + (group * to.levels * count + inside) * kGroup;
        int8_t* second = to.levels == 2 ? first + count * kGroup : nullptr;
        quantize_group(row + group * kGroup, first, second, scales + at, sums + at);
      }
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
