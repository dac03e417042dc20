// Activations into blocks of tokens: quantized to eight bits in groups of 32, or plain. Included by all_kernels.h.

int64_t token_block(int64_t remaining) {
  int64_t size = kMostTokens;
  while (size > remaining) size /= 2;
  return size;
}

// One group of one token: codes, scale, and scale times the sum of the codes.
inline void quantize_group(const float* x, int8_t* codes, float* scale, float* scaled_sum) {
  const Floats first = load(x), second = load(x + 16);
  const int32_t bits = largest(larger_magnitude(larger_magnitude(int_zeros(), first), second));
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  if (!(magnitude <= 3.402823466e38f)) {
    // Infinity or no number: so is then every product with this group, as it would be without quantization.
    __builtin_memset(codes, 0, kGroup);
    *scale = *scaled_sum = __builtin_nanf("");
    return;
  }
  // Below this a code's inverse scale would overflow. Such a group is zero beside any other.
  const bool vanishes = magnitude < 1e-30f;
  const Floats inverse = broadcast(vanishes ? 0.0f : 127.0f / magnitude);
  const Ints low = to_ints(multiply(first, inverse)), high = to_ints(multiply(second, inverse));
  store_int8(codes, low);
  store_int8(codes + 16, high);
  *scale = vanishes ? 0.0f : magnitude / 127.0f;
  *scaled_sum = *scale * static_cast<float>(sum(add(low, high)));
}

void quantize(const float* x, int64_t first, int64_t last, const Activations& to) {
  const int64_t width = to.groups * kGroup;
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    int8_t* codes = to.codes + token * width;
    float* scales = to.scales + token * to.groups;
    float* sums = to.sums + token * to.groups;
    for (int64_t inside = 0; inside < count; ++inside) {
      const float* row = x + (token + inside) * width;
      for (int64_t group = 0; group < to.groups; ++group) {
        const int64_t at = group * count + inside;
        quantize_group(row + group * kGroup, codes + at * kGroup, scales + at, sums + at);
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
