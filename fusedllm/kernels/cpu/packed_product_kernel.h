// Products of packed weights with quantized activations. Included by all_kernels.h.
//
// A panel is sixteen rows. Its group holds for each j of 0 to 7 the elements 4 j to 4 j + 3 of every row: 64 bytes that
// one integer instruction multiplies with four broadcast codes of a token and adds up to sixteen sums. See packing.h.

template <Format kFormat>
struct Layout {
  static constexpr int kBits =
      kFormat == Format::kQ8 ? 8 : (kFormat == Format::kQ5 || kFormat == Format::kQ5Min ? 5 : 4);
  static constexpr bool kHasZeros = kFormat == Format::kQ4Zero;
  // A zero point is the minimum -scale * zero.
  static constexpr bool kHasMinimums = kFormat == Format::kQ4Min || kFormat == Format::kQ5Min || kHasZeros;
  // What is subtracted from a code is eight shifted left by so much, unless the variant's products are of signed bytes;
  // -1 for nothing.
  static constexpr int kOffset = kHasMinimums || (kBits == 8 && kSignedBytes) ? -1 : kBits - 4;
  // Of the scales, and minimums or zero points, of one or more groups.
  static constexpr int kNumberBytes = kHasMinimums ? 4 * kPanelRows : 2 * kPanelRows;
  static constexpr int kGroupBytes = kBits == 8 ? 512 : (kBits == 5 ? 320 : 256);
};

template <Format kFormat>
inline void unpack_group(const uint8_t* codes, Bytes (&weights)[8]) {
  constexpr int kBits = Layout<kFormat>::kBits;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (kBits == 8) {
      weights[j] = load_bytes(codes + 64 * j);
      weights[j + 4] = load_bytes(codes + 64 * (j + 4));
    } else {
      const Bytes both = load_bytes(codes + 64 * j);
      weights[j] = low_nibbles(both);
      weights[j + 4] = high_nibbles(both);
    }
  }
  if constexpr (kBits == 5) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) weights[j] = with_fifth_bits(weights[j], codes + 256 + 8 * j);
  }
}

// How far ahead of its use a panel's memory is asked for, into the second-level cache: the first can't wait for enough.
constexpr int kPrefetchBytes = 4096;

// The first level's sum of products, raised to where the second's is added, and with what the codes' offset
// (8 << kOffset) asks for: kOffset = -1 for none.
template <int kOffset, int kLevels>
inline Ints corrected(Ints dot, int32_t correction) {
  constexpr int kRaised = kLevels == 2 ? 8 : 0;
  if constexpr (kOffset < 0) {
    return shift_left<kRaised>(dot);
  } else if constexpr (kLevels == 1) {
    return add(dot, shift_left<kOffset>(broadcast_int(correction)));
  } else {
    // One shift for both, where the offset is more than eight.
    return shift_left<kOffset>(add(shift_left<kRaised - kOffset>(dot), broadcast_int(correction)));
  }
}

// `numbers` is how many scales a row has, each for `shared` groups, where kShared; else there is one for each group.
template <Format kFormat, int kTokens, int kLevels, bool kShared>
void panel_product(const uint8_t* panel, const Activations& x, int64_t token, int64_t shared, int64_t numbers,
                   float* out, int64_t stride, int rows) {
  using L = Layout<kFormat>;
  const int64_t groups = x.groups;
  const int8_t* codes = x.codes + token * groups * kGroup * kLevels;
  const float* x_scales = x.scales + token * groups;
  const float* x_sums = x.sums + token * groups;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + groups * L::kGroupBytes);
  const uint16_t* minimums = scales + (kShared ? numbers : groups) * kPanelRows;
  const int32_t* x_corrections = x.corrections + token * groups;
  Floats totals[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) totals[t] = broadcast(x.starts[token + t]);
  Scales scale = scales_of(zeros());
  Floats minimum = zeros();
  int64_t left = 0;  // groups until the next scale
  for (int64_t group = 0; group < groups; ++group) {
    Bytes weights[8];
    unpack_group<kFormat>(panel, weights);
    if constexpr (kTokens <= 8) {
#pragma GCC unroll 8
      for (int line = 0; line < L::kGroupBytes; line += 64) __builtin_prefetch(panel + kPrefetchBytes + line, 0, 2);
    }
    panel += L::kGroupBytes;
    if (!kShared || left == 0) {
      scale = scales_of(load_half(scales));
      scales += kPanelRows;
      if constexpr (L::kHasMinimums) {
        minimum = load_half(minimums);
        minimums += kPanelRows;
        if constexpr (L::kHasZeros) minimum = subtract(zeros(), multiply(scale.value, minimum));
      }
      left = shared;
    }
    --left;
    constexpr int kCount = kTokens < kTogether ? kTokens : kTogether;
#pragma GCC unroll 8
    for (int first = 0; first < kTokens; first += kCount) {
      Ints dots[kCount];
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) dots[t] = int_zeros();
      dot_group<L::kBits, kCount>(weights, codes + first * kGroup, dots);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) {
        dots[t] = corrected<L::kOffset, kLevels>(dots[t], x_corrections[first + t]);
      }
      if constexpr (kLevels == 2) {
        const int8_t* second = codes + (kTokens + first) * kGroup;
        if constexpr (kCount == kTogether) {
          dot_group<L::kBits, kCount>(weights, second, dots);
        } else {
          // Sums of their own, as too few tokens take turns to hide how long each sum waits for the last.
          Ints rests[kCount];
          for (int t = 0; t < kCount; ++t) rests[t] = int_zeros();
          dot_group<L::kBits, kCount>(weights, second, rests);
          for (int t = 0; t < kCount; ++t) dots[t] = add(dots[t], rests[t]);
        }
      }
#pragma GCC unroll 4
      for (int t = first; t < first + kCount; ++t) {
        const Floats step = kLevels == 2 && kTokens >= 8 ? times_power(scale, x_scales + t)
                                                         : multiply(scale.value, broadcast(x_scales[t]));
        totals[t] = multiply_add(to_floats(dots[t - first]), step, totals[t]);
        if constexpr (L::kHasMinimums) totals[t] = multiply_add(minimum, broadcast(x_sums[t]), totals[t]);
      }
    }
    codes += kTokens * kGroup * kLevels;
    x_scales += kTokens;
    x_sums += kTokens;
    x_corrections += kTokens;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    if (rows == kPanelRows) {
      store(out + t * stride, totals[t]);
    } else {
      store_first(out + t * stride, totals[t], rows);
    }
  }
}

// Asks for the scales of the next panel, whose codes are read without a pause after this one's.
inline void prefetch_numbers(const uint8_t* numbers, int64_t bytes) {
  constexpr int64_t kMost = 2048;
  for (int64_t line = 0; line < (bytes < kMost ? bytes : kMost); line += 64) __builtin_prefetch(numbers + line, 0, 2);
}

template <Format kFormat, int kLevels, bool kShared>
void packed_product_of(const Product& product, const Activations& x, int64_t first_panel, int64_t last_panel,
                       int64_t first, int64_t last) {
  const int64_t shared = product.shared;
  const int64_t numbers = kShared ? (x.groups + shared - 1) / shared : x.groups;
  const int64_t code_bytes = x.groups * Layout<kFormat>::kGroupBytes;
  const int64_t number_bytes = numbers * Layout<kFormat>::kNumberBytes;
  const int64_t panel_bytes = (code_bytes + number_bytes + 63) / 64 * 64;
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(x.tokens - token);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const uint8_t* weights = product.weight + panel * panel_bytes;
      const int64_t row = panel * kPanelRows;
      const int rows = product.rows - row < kPanelRows ? static_cast<int>(product.rows - row) : kPanelRows;
      float* out = product.out + token * product.rows + row;
      if (count <= 8) prefetch_numbers(weights + panel_bytes + code_bytes, number_bytes);
      const auto multiply = [&](auto panel_product) {
        panel_product(weights, x, token, shared, numbers, out, product.rows, rows);
      };
      switch (count) {
        case 1: multiply(panel_product<kFormat, 1, kLevels, kShared>); break;
        case 2: multiply(panel_product<kFormat, 2, kLevels, kShared>); break;
        case 4: multiply(panel_product<kFormat, 4, kLevels, kShared>); break;
        case 8:
          if constexpr (kMostTokens >= 8) multiply(panel_product<kFormat, 8, kLevels, kShared>);
          break;
        default:
          if constexpr (kMostTokens >= 16) multiply(panel_product<kFormat, 16, kLevels, kShared>);
      }
    }
    token += count;
  }
}

template <int kLevels>
void packed_product_in(const Product& product, const Activations& x, int64_t first_panel, int64_t last_panel,
                       int64_t first, int64_t last) {
  const auto multiply_all = [&](auto multiply) { multiply(product, x, first_panel, last_panel, first, last); };
  if (product.shared > 1 || product.format == Format::kQ4Zero) {
    switch (product.format) {
      case Format::kQ4: return multiply_all(packed_product_of<Format::kQ4, kLevels, true>);
      case Format::kQ8: return multiply_all(packed_product_of<Format::kQ8, kLevels, true>);
      case Format::kQ4Zero: return multiply_all(packed_product_of<Format::kQ4Zero, kLevels, true>);
      default: return;
    }
  }
  switch (product.format) {
    case Format::kQ4: return multiply_all(packed_product_of<Format::kQ4, kLevels, false>);
    case Format::kQ4Min: return multiply_all(packed_product_of<Format::kQ4Min, kLevels, false>);
    case Format::kQ5: return multiply_all(packed_product_of<Format::kQ5, kLevels, false>);
    case Format::kQ5Min: return multiply_all(packed_product_of<Format::kQ5Min, kLevels, false>);
    case Format::kQ8: return multiply_all(packed_product_of<Format::kQ8, kLevels, false>);
    default: return;
  }
}

void packed_product(const Product& product, const Activations& x, int64_t first_panel, int64_t last_panel,
                    int64_t first, int64_t last) {
  if (x.levels == 2) return packed_product_in<2>(product, x, first_panel, last_panel, first, last);
  packed_product_in<1>(product, x, first_panel, last_panel, first, last);
}
