// Products of packed weights with one scale a row and activations with one scale a token: sums of integers, which both
// scales multiply at the end. Included by all_kernels.h.
//
// `kernels/linear.py` defines them with XLA, and both give the same bits: codes are rounded by the same operations, and
// a sum of integers is the same in any order. With kMostIntegerColumns it stays below 2^31, as what the codes' offset
// of 128 makes is subtracted before anything is added.

void quantize_tokens(const float* x, int64_t first, int64_t last, const IntegerActivations& to) {
  const int64_t width = to.groups * kGroup;
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    int8_t* block = to.codes + token * width;
    for (int64_t inside = 0; inside < count; ++inside) {
      const float* row = x + (token + inside) * width;
      Ints so_far = int_zeros();
      for (int64_t i = 0; i < width; i += 16) so_far = larger_magnitude(so_far, load(row + i));
      const int32_t bits = largest(so_far);
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
      const bool finite = bits < 0x7f800000;
      const bool codes = finite && magnitude >= kSmallest;
      const Floats inverse = broadcast(codes ? 127.0f / magnitude : 0.0f);
      Ints total = int_zeros();
      for (int64_t i = 0; i < width; i += 16) {
        // Where there are no codes an element may be infinite, which times zero is no number.
        const Ints code = codes ? to_ints(multiply(load(row + i), inverse)) : int_zeros();
        store_int8(block + (i / kGroup * count + inside) * kGroup + i % kGroup, code);
        total = add(total, code);
      }
      to.scales[token + inside] = codes ? magnitude * (1.0f / 127.0f) : (finite ? 0.0f : __builtin_nanf(""));
      to.corrections[token + inside] = -128 * sum(total);
    }
    token += count;
  }
}

template <int kTokens>
void integer_panel_product(const uint8_t* panel, const IntegerActivations& x, int64_t token, float* out,
                           int64_t stride, int rows) {
  const int8_t* codes = x.codes + token * x.groups * kGroup;
  constexpr int kCount = kTokens < kTogether ? kTokens : kTogether;
  Ints totals[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) totals[t] = kSignedBytes ? int_zeros() : broadcast_int(x.corrections[token + t]);
  for (int64_t group = 0; group < x.groups; ++group) {
    Bytes weights[8];
    unpack_group<Format::kQ8>(panel, weights);
    if constexpr (kTokens <= 8) {
#pragma GCC unroll 8
      for (int line = 0; line < 512; line += 64) __builtin_prefetch(panel + kPrefetchBytes + line, 0, 2);
    }
    panel += Layout<Format::kQ8>::kGroupBytes;
#pragma GCC unroll 8
    for (int first = 0; first < kTokens; first += kCount) {
      dot_group<8, kCount>(weights, codes + first * kGroup, totals + first);
    }
    codes += kTokens * kGroup;
  }
  const Floats scale = load_half(reinterpret_cast<const uint16_t*>(panel));
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    const Floats result = multiply(multiply(to_floats(totals[t]), broadcast(x.scales[token + t])), scale);
    if (rows == kPanelRows) {
      store(out + t * stride, result);
    } else {
      store_first(out + t * stride, result, rows);
    }
  }
}

void integer_product(const Product& product, const IntegerActivations& x, int64_t first_panel, int64_t last_panel,
                     int64_t first, int64_t last) {
  const int64_t panel_bytes = (x.groups * Layout<Format::kQ8>::kGroupBytes + 2 * kPanelRows + 63) / 64 * 64;
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(x.tokens - token);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const uint8_t* weights = product.weight + panel * panel_bytes;
      const int64_t row = panel * kPanelRows;
      const int rows = product.rows - row < kPanelRows ? static_cast<int>(product.rows - row) : kPanelRows;
      float* out = product.out + token * product.rows + row;
      const auto multiply = [&](auto panel_product) { panel_product(weights, x, token, out, product.rows, rows); };
      switch (count) {
        case 1: multiply(integer_panel_product<1>); break;
        case 2: multiply(integer_panel_product<2>); break;
        case 4: multiply(integer_panel_product<4>); break;
        case 8:
          if constexpr (kMostTokens >= 8) multiply(integer_panel_product<8>);
          break;
        default:
          if constexpr (kMostTokens >= 16) multiply(integer_panel_product<16>);
      }
    }
    token += count;
  }
}
