// Products modulo 2^32 of int32 with int8, and what the trusted side does around them. Included by all_kernels.h.
//
// A number is the sum of its limbs, each times a power of two; so is a product with it. Each variant cuts numbers into
// limbs that its instructions multiply with int8 and add up in int32, where an overflow is what modulo 2^32 means.

// A token's limbs lie as its columns are multiplied, all of kRingColumns numbers before those of the next: planes of their
// own would be far apart by a power of two, and push each other out of the caches.
void split_limbs(const int32_t* x, const RingProduct& to, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int32_t* row = x + token * to.width;
    Limb* limbs = reinterpret_cast<Limb*>(to.limbs + token * to.padded * 4);
    for (int64_t column = 0; column < to.padded; column += kRingColumns, limbs += kLimbs * kRingColumns) {
      uint32_t numbers[kRingColumns] = {};
      const int64_t left = to.width - column, count = left < kRingColumns ? (left < 0 ? 0 : left) : kRingColumns;
      __builtin_memcpy(numbers, row + column, static_cast<size_t>(count) * sizeof *numbers);
#pragma GCC unroll 4
      for (int limb = 0; limb < kLimbs; ++limb) {
        // Signed limbs of sixteen bits: what the lower one lacks when it is negative is added to the upper one.
        const uint32_t carry = kLimbBits == 16 && limb == 1 ? 0x8000u : 0u;
        for (int i = 0; i < kRingColumns; ++i) {
          limbs[limb * kRingColumns + i] = static_cast<Limb>((numbers[i] + carry) >> (limb * kLimbBits));
        }
      }
    }
  }
}

template <int kTokens, int kRows>
void ring_block(const RingProduct& of, int64_t token, int64_t row) {
  const Limb* limbs = reinterpret_cast<const Limb*>(of.limbs + token * of.padded * 4);
  const int8_t* weight = of.weight + row * of.width;
  RingSum sums[kTokens][kRows][kLimbs];
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int limb = 0; limb < kLimbs; ++limb) sums[t][r][limb] = ring_zeros();
    }
  }
  const auto step = [&](const RingWeights (&weights)[kRows], int64_t column) {
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int limb = 0; limb < kLimbs; ++limb) {
        const LimbVector x = load_limbs(limbs + t * kLimbs * of.padded + kLimbs * column + limb * kRingColumns);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[t][r][limb] = ring_dot(sums[t][r][limb], x, weights[r]);
      }
    }
  };
  int64_t column = 0;
  RingWeights weights[kRows];
  for (; column + kRingColumns <= of.width; column += kRingColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load_ring_weights(weight + r * of.width + column);
    step(weights, column);
  }
  if (column < of.width) {
    const int left = static_cast<int>(of.width - column);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load_first_ring_weights(weight + r * of.width + column, left);
    step(weights, column);
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) of.out[(token + t) * of.rows + row + r] = ring_total(sums[t][r]);
  }
}

template <int kTokens, int kRows>
void ring_rows(const RingProduct& of, int64_t token, int64_t first_row, int64_t last_row) {
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows) ring_block<kTokens, kRows>(of, token, row);
  for (; row < last_row; ++row) ring_block<kTokens, 1>(of, token, row);
}

void ring_product(const RingProduct& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last) {
  int64_t token = first;
  for (; token + kRingTokens <= last; token += kRingTokens) {
    ring_rows<kRingTokens, kRingRows>(product, token, first_row, last_row);
  }
  for (; token < last; ++token) ring_rows<1, kLoneRingRows>(product, token, first_row, last_row);
}

// As `quantize_tokens`, of which this differs in where codes go, and in taking any width.
void ring_encode(const RingEncoding& of, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int64_t start = token * of.width;
    const float* row = of.x + start;
    Ints so_far = int_zeros();
    for (int64_t i = 0; i < of.width; i += 16) {
      const int count = of.width - i < 16 ? static_cast<int>(of.width - i) : 16;
      so_far = larger_magnitude(so_far, count == 16 ? load(row + i) : load_first(row + i, count));
    }
    const int32_t bits = largest(so_far);
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    const bool finite = bits < 0x7f800000;
    const bool coded = finite && magnitude >= kSmallest;
    const Floats inverse = broadcast(coded ? 127.0f / magnitude : 0.0f);
    of.scales[token] = coded ? magnitude * (1.0f / 127.0f) : (finite ? 0.0f : __builtin_nanf(""));
    for (int64_t i = 0; i < of.width; i += 16) {
      const int count = of.width - i < 16 ? static_cast<int>(of.width - i) : 16;
      const bool whole = count == 16;
      Ints code = int_zeros();
      if (coded) code = to_ints(multiply(whole ? load(row + i) : load_first(row + i, count), inverse));
      if (of.codes != nullptr) {
        if (whole) {
          store_int8(of.codes + start + i, code);
        } else {
          int8_t few[16];
          store_int8(few, code);
          __builtin_memcpy(of.codes + start + i, few, static_cast<size_t>(count));
        }
      }
      if (of.masked == nullptr) continue;
      if (of.pads != nullptr) {
        const int32_t* pad = of.pads + start + i;
        code = add(code, whole ? load_ints(pad) : load_first_ints(pad, count));
      }
      if (whole) {
        store_ints(of.masked + start + i, code);
      } else {
        store_first_ints(of.masked + start + i, code, count);
      }
    }
  }
}

bool ring_decode(const RingDecoding& of, int64_t first, int64_t last) {
  // The largest sum, and the largest of -1 less a sum, which no number overflows.
  Ints above = int_zeros(), below = int_zeros();
  for (int64_t token = first; token < last; ++token) {
    const int64_t start = token * of.width;
    const Floats scale = broadcast(of.token_scales == nullptr ? 0.0f : of.token_scales[token]);
    for (int64_t i = 0; i < of.width; i += 16) {
      const int count = of.width - i < 16 ? static_cast<int>(of.width - i) : 16;
      const bool whole = count == 16;
      const auto ints = [&](const int32_t* p) { return whole ? load_ints(p) : load_first_ints(p, count); };
      Ints sum = ints(of.sums + start + i);
      if (of.pads != nullptr) sum = subtract(sum, ints(of.pads + start + i));
      above = maximum(above, sum);
      below = maximum(below, subtract(broadcast_int(-1), sum));
      if (of.integers != nullptr) {
        if (whole) {
          store_ints(of.integers + start + i, sum);
        } else {
          store_first_ints(of.integers + start + i, sum, count);
        }
      }
      if (of.out == nullptr) continue;
      const float* other = of.output_scales + i;
      const Floats value =
          multiply(multiply(to_floats(sum), scale), whole ? load(other) : load_first(other, count));
      if (whole) {
        store(of.out + start + i, value);
      } else {
        store_first(of.out + start + i, value, count);
      }
    }
  }
  return largest(above) <= of.bound && largest(below) < of.bound;
}

// 2^31 - 1, a prime; 2^31 is 1 modulo it.
constexpr uint64_t kPrime = 0x7fffffffu;

inline uint64_t non_negative(int64_t x) {
  const int64_t rest = x % static_cast<int64_t>(kPrime);
  return static_cast<uint64_t>(rest < 0 ? rest + static_cast<int64_t>(kPrime) : rest);
}

uint32_t residue(const int32_t* x, const uint32_t* secret, int64_t width) {
  // The halves of products of 62 bits: either sum has 31 bits to spare.
  uint64_t low = 0;
  int64_t high = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int64_t product = static_cast<int64_t>(x[i]) * static_cast<int32_t>(secret[i]);
    low += static_cast<uint32_t>(product);
    high += product >> 32;
  }
  return static_cast<uint32_t>((low % kPrime + 2 * non_negative(high)) % kPrime);
}

uint32_t residue_of_codes(const int8_t* x, const uint32_t* secret, int64_t width) {
  // Products of 38 bits.
  int64_t total = 0;
  for (int64_t i = 0; i < width; ++i) {
    total += static_cast<int64_t>(static_cast<int32_t>(secret[i])) * static_cast<int32_t>(x[i]);
  }
  return static_cast<uint32_t>(non_negative(total));
}

void weigh_columns(const int8_t* weight, const uint32_t* secrets, int64_t rounds, int64_t rows, int64_t width,
                   int64_t first, int64_t last, uint32_t* out) {
  for (int64_t round = 0; round < rounds; ++round) {
    // Of products of 38 bits: room for 2^25 rows.
    int64_t totals[kRingColumnsTogether] = {};
    const int64_t count = last - first;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t secret = static_cast<int32_t>(secrets[round * rows + row]);
      const int8_t* columns = weight + row * width + first;
      for (int64_t i = 0; i < count; ++i) totals[i] += secret * static_cast<int32_t>(columns[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      out[round * width + first + i] = static_cast<uint32_t>(non_negative(totals[i]));
    }
  }
}

int64_t largest_row(const int8_t* weight, int64_t width, int64_t first, int64_t last) {
  int64_t most = 0;
  for (int64_t row = first; row < last; ++row) {
    // Of at most kMostIntegerColumns magnitudes of 128.
    int32_t total = 0;
    for (int64_t i = 0; i < width; ++i) {
      const int32_t value = weight[row * width + i];
      total += value < 0 ? -value : value;
    }
    most = total > most ? total : most;
  }
  return most;
}
