// Products of plain weights, rows of bfloat16, float16 or float32, with float32 activations. Included by all_kernels.h.

template <Format kFormat>
constexpr int64_t element_bytes() { return kFormat == Format::kFloat32 ? 4 : 2; }

template <Format kFormat>
inline Floats load_narrow(const uint16_t* p) {
  if constexpr (kFormat == Format::kFloat16) {
    return load_half(p);
  } else {
    return load_bfloat16(p);
  }
}

// Sixteen consecutive elements of a row from `k` on, those past its end zero.
template <Format kFormat>
inline Floats load_row(const uint8_t* row, int64_t k, int64_t width) {
  const int64_t left = width - k;
  if constexpr (kFormat == Format::kFloat32) {
    const float* p = reinterpret_cast<const float*>(row) + k;
    return left >= 16 ? load(p) : load_first(p, static_cast<int>(left));
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row) + k;
    if (left >= 16) return load_narrow<kFormat>(p);
    uint16_t padded[16] = {};
    __builtin_memcpy(padded, p, static_cast<size_t>(left) * sizeof *p);
    return load_narrow<kFormat>(padded);
  }
}

template <Format kFormat>
void vector_product_of(const Product& product, const float* x, int64_t first, int64_t last, float* out) {
  constexpr int kRows = 4;
  const int64_t width = product.width;
  const int64_t row_bytes = width * element_bytes<kFormat>();
  for (int64_t row = first; row < last; row += kRows) {
    const uint8_t* rows[kRows];
    Floats totals[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      // Past the last row the last one is read again, and its result not stored.
      rows[r] = product.weight + (row + r < last ? row + r : last - 1) * row_bytes;
      totals[r] = zeros();
    }
    int64_t k = 0;
    for (; k + 16 <= width; k += 16) {
      const Floats value = load(x + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) totals[r] = multiply_add(load_row<kFormat>(rows[r], k, width), value, totals[r]);
    }
    if (k < width) {
      const Floats value = load_first(x + k, static_cast<int>(width - k));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) totals[r] = multiply_add(load_row<kFormat>(rows[r], k, width), value, totals[r]);
    }
    for (int r = 0; r < kRows && row + r < last; ++r) out[row + r] = sum(totals[r]);
  }
}

void float_vector_product(const Product& product, const float* x, int64_t first, int64_t last, float* out) {
  switch (product.format) {
    case Format::kFloat32: return vector_product_of<Format::kFloat32>(product, x, first, last, out);
    case Format::kFloat16: return vector_product_of<Format::kFloat16>(product, x, first, last, out);
    default: return vector_product_of<Format::kBfloat16>(product, x, first, last, out);
  }
}

template <int kTokens>
void scratch_product(const float* panel, const FloatActivations& x, int64_t token, float* out, int64_t stride,
                     int rows) {
  const float* values = x.values + token * x.width;
  Floats totals[kTokens];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) totals[t] = zeros();
  for (int64_t k = 0; k < x.width; ++k) {
    const Floats weight = load(panel + k * kPanelRows);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) totals[t] = multiply_add(weight, broadcast(values[t]), totals[t]);
    values += kTokens;
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

// Sixteen rows as columns: `scratch[k * 16 + r]`, rows past the last one zero.
template <Format kFormat>
void transpose_panel(const Product& product, int64_t row, int rows, float* scratch) {
  const int64_t width = product.width;
  const int64_t row_bytes = width * element_bytes<kFormat>();
  for (int64_t k = 0; k < width; k += 16) {
    Floats block[16];
    for (int r = 0; r < kPanelRows; ++r) {
      block[r] = r < rows ? load_row<kFormat>(product.weight + (row + r) * row_bytes, k, width) : zeros();
    }
    transpose(block);
    for (int64_t i = 0; i < 16 && k + i < width; ++i) store(scratch + (k + i) * kPanelRows, block[i]);
  }
}

void float_product(const Product& product, const FloatActivations& x, int64_t first_panel, int64_t last_panel,
                   int64_t first, int64_t last, float* scratch) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int rows = product.rows - row < kPanelRows ? static_cast<int>(product.rows - row) : kPanelRows;
    switch (product.format) {
      case Format::kFloat32: transpose_panel<Format::kFloat32>(product, row, rows, scratch); break;
      case Format::kFloat16: transpose_panel<Format::kFloat16>(product, row, rows, scratch); break;
      default: transpose_panel<Format::kBfloat16>(product, row, rows, scratch);
    }
    for (int64_t token = first; token < last;) {
      const int64_t count = token_block(x.tokens - token);
      float* out = product.out + token * product.rows + row;
      switch (count) {
        case 1: scratch_product<1>(scratch, x, token, out, product.rows, rows); break;
        case 2: scratch_product<2>(scratch, x, token, out, product.rows, rows); break;
        case 4: scratch_product<4>(scratch, x, token, out, product.rows, rows); break;
        case 8:
          if constexpr (kMostTokens >= 8) scratch_product<8>(scratch, x, token, out, product.rows, rows);
          break;
        default:
          if constexpr (kMostTokens >= 16) scratch_product<16>(scratch, x, token, out, product.rows, rows);
      }
      token += count;
    }
  }
}
