// Products of bfloat16 rows with activations rounded to bfloat16, summed in float32, where the processor has them
// (AVX512-BF16): twice the products an instruction of float32's. Included by all_kernels.h.
//
// Two neighbours of a row, or of a token, are one pair of 32 bits. Sixteen rows become a panel `[pairs][16]`, a block of n
// tokens `[pairs][n]`; behind an odd last element stands a zero. Denormal numbers count as zero, as the instruction has it.

#if defined(__AVX512BF16__)

// Sixteen pairs of a row of `width` elements from element k on, zeros past its end.
inline Floats load_pairs(const uint8_t* row, int64_t k, int64_t width) {
  const uint8_t* from = row + 2 * k;
  if (width - k >= 32) return load(reinterpret_cast<const float*>(from));
  uint16_t padded[32] = {};
  __builtin_memcpy(padded, from, static_cast<size_t>(width - k) * sizeof *padded);
  return load(reinterpret_cast<const float*>(padded));
}

// The same of float32, rounded.
inline Floats round_pairs(const float* row, int64_t k, int64_t width) {
  const int64_t left = width - k;
  const Floats low = load_first(row + k, left < 16 ? static_cast<int>(left) : 16);
  const Floats high = left <= 16 ? zeros() : load_first(row + k + 16, left < 32 ? static_cast<int>(left - 16) : 16);
  return pairs_of(low, high);
}

// Stores the `count` columns of sixteen vectors of pairs that are inside the row.
inline void store_columns(Floats (&pairs)[16], int64_t count, float* out) {
  transpose(pairs);
  for (int64_t i = 0; i < 16 && i < count; ++i) store(out + 16 * i, pairs[i]);
}

void interleave_pairs(const float* x, int64_t first, int64_t last, const FloatActivations& to) {
  const int64_t pairs = (to.width + 1) / 2;
  for (int64_t token = first; token < last;) {
    const int64_t count = token_block(to.tokens - token);
    float* block = to.values + token * pairs;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      Floats columns[16];
      for (int64_t t = 0; t < count; ++t) columns[t] = round_pairs(x + (token + t) * to.width, 2 * pair, to.width);
      if (count == 16) {
        store_columns(columns, pairs - pair, block + pair * 16);
        continue;
      }
      for (int64_t t = 0; t < count; ++t) {
        float values[16];
        store(values, columns[t]);
        for (int64_t i = 0; i < 16 && pair + i < pairs; ++i) {
          __builtin_memcpy(block + (pair + i) * count + t, values + i, sizeof *values);
        }
      }
    }
    token += count;
  }
}

template <int kTokens>
void pairs_product(const float* panel, const float* values, int64_t pairs, float* out, int64_t stride, int rows) {
  Floats totals[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) totals[t] = zeros();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const Floats weight = load(panel + pair * kPanelRows);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) totals[t] = add_pair_products(totals[t], weight, values + t);
    values += kTokens;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) store_first(out + t * stride, totals[t], rows);
}

void bfloat16_product(const Product& product, const FloatActivations& x, int64_t first_panel, int64_t last_panel,
                      int64_t first, int64_t last, float* scratch) {
  const int64_t pairs = (product.width + 1) / 2;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int rows = product.rows - row < kPanelRows ? static_cast<int>(product.rows - row) : kPanelRows;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      Floats columns[16];
      for (int r = 0; r < kPanelRows; ++r) {
        columns[r] =
            r < rows ? load_pairs(product.weight + (row + r) * product.width * 2, 2 * pair, product.width) : zeros();
      }
      store_columns(columns, pairs - pair, scratch + pair * kPanelRows);
    }
    for (int64_t token = first; token < last;) {
      const int64_t count = token_block(x.tokens - token);
      const float* values = x.values + token * pairs;
      float* out = product.out + token * product.rows + row;
      switch (count) {
        case 1: pairs_product<1>(scratch, values, pairs, out, product.rows, rows); break;
        case 2: pairs_product<2>(scratch, values, pairs, out, product.rows, rows); break;
        case 4: pairs_product<4>(scratch, values, pairs, out, product.rows, rows); break;
        case 8: pairs_product<8>(scratch, values, pairs, out, product.rows, rows); break;
        default: pairs_product<16>(scratch, values, pairs, out, product.rows, rows);
      }
      token += count;
    }
  }
}

#else

constexpr auto interleave_pairs = nullptr;
constexpr auto bfloat16_product = nullptr;

#endif
