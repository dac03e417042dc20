// Grouped codes: the quantizer, by the extremes of each group, and its inverse. Included by all_kernels.h.

inline const float* span_of_floats(const Grouping& of, int64_t row, int64_t begin, int64_t count, int64_t padded,
                                   float* scratch) {
  const int64_t at = row * of.width + begin;
  if (of.number == 0) {
    const float* x = static_cast<const float*>(of.weights) + at;
    if (count == padded) return x;
    __builtin_memcpy(scratch, x, static_cast<size_t>(count) * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(of.weights) + at;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(scratch + i, of.number == 1 ? load_half(x + i) : load_bfloat16(x + i));
    if (i < count) {
      uint16_t last[16] = {};
      __builtin_memcpy(last, x + i, static_cast<size_t>(count - i) * sizeof(uint16_t));
      store(scratch + i, of.number == 1 ? load_half(last) : load_bfloat16(last));
    }
  }
  for (int64_t i = count; i < padded; ++i) scratch[i] = 0.0f;
  return scratch;
}

// Eight codes, one in each byte of `x`, into the low `bits` bytes: pairs, then fours, then all eight move together.
inline uint64_t squeeze(uint64_t x, int bits) {
  const int gap = 8 - bits;
  const uint64_t one = (uint64_t{1} << bits) - 1, two = (uint64_t{1} << 2 * bits) - 1;
  const uint64_t four = (uint64_t{1} << 4 * bits) - 1;
  x = (x & one * 0x0001000100010001) | (x >> gap & (one << bits) * 0x0001000100010001);
  x = (x & two * 0x0000000100000001) | (x >> 2 * gap & (two << 2 * bits) * 0x0000000100000001);
  return (x & four) | (x >> 4 * gap & four << 4 * bits);
}

inline uint64_t spread(uint64_t x, int bits) {
  const int gap = 8 - bits;
  const uint64_t one = (uint64_t{1} << bits) - 1, two = (uint64_t{1} << 2 * bits) - 1;
  const uint64_t four = (uint64_t{1} << 4 * bits) - 1;
  x = (x & four) | (x & four << 4 * bits) << 4 * gap;
  x = (x & two * 0x0000000100000001) | (x & (two << 2 * bits) * 0x0000000100000001) << 2 * gap;
  return (x & one * 0x0001000100010001) | (x & (one << bits) * 0x0001000100010001) << gap;
}

template <int kBits>
inline void pack_codes_of(const uint8_t* codes, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t x;
    __builtin_memcpy(&x, codes + i, 8);
    x = squeeze(x, kBits);
    __builtin_memcpy(out + i / 8 * kBits, &x, kBits);
  }
}

inline void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  switch (bits) {
    case 3: return pack_codes_of<3>(codes, count, out);
    case 4: return pack_codes_of<4>(codes, count, out);
    case 5: return pack_codes_of<5>(codes, count, out);
    case 6: return pack_codes_of<6>(codes, count, out);
    default: return pack_codes_of<7>(codes, count, out);
  }
}

// What the float16 that a float is rounded up to becomes as a float, and what is stored of it.
inline void store_scales(const Grouping& of, int64_t at, int64_t count, float* scales) {
  if (of.wide) {
    __builtin_memcpy(static_cast<float*>(of.scales) + at, scales, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i += 16) {
    uint16_t halves[16];
    const Floats exact = load(scales + i);
    store_half(halves, exact);
    float nearest[16];
    store(nearest, load_half(halves));
    for (int j = 0; j < 16; ++j) halves[j] = static_cast<uint16_t>(halves[j] + (nearest[j] < scales[i + j]));
    store(scales + i, load_half(halves));
    const int64_t some = count - i < 16 ? count - i : 16;
    __builtin_memcpy(static_cast<uint16_t*>(of.scales) + at + i, halves, static_cast<size_t>(some) * sizeof(uint16_t));
  }
}

inline void store_zeros(const Grouping& of, int64_t at, int64_t count, const float* zeros) {
  if (of.wide) {
    __builtin_memcpy(static_cast<float*>(of.zeros) + at, zeros, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i += 16) {
    uint16_t halves[16];
    store_half(halves, load(zeros + i));
    const int64_t some = count - i < 16 ? count - i : 16;
    __builtin_memcpy(static_cast<uint16_t*>(of.zeros) + at + i, halves, static_cast<size_t>(some) * sizeof(uint16_t));
  }
}

// As in `kernels/quantize.py`: what a scale must reach not to become zero, and the smallest scale of either dtype.
constexpr float kSmallestReach = 0x1p-100f, kSmallestHalf = 0x1p-24f, kLargestHalf = 65504.0f;

// `zeros` under another name, which a group's zero points have taken.
inline Floats none() { return zeros(); }

// Codes of one group; adds the squared errors and the squared weights to the sums.
inline void encode_group(const float* x, int64_t size, float scale, float inverse, float zero, float low, float high,
                         uint8_t* codes, Floats& errors, Floats& powers) {
  const Floats scales = broadcast(scale), inverses = broadcast(inverse), zeros = broadcast(zero);
  const Floats lows = broadcast(low), highs = broadcast(high);
  for (int64_t i = 0; i < size; i += 16) {
    const Floats weights = load(x + i);
    Floats code = add(round_even(multiply(weights, inverses)), zeros);
    code = maximum(minimum(code, highs), lows);
    store_int8(reinterpret_cast<int8_t*>(codes + i), to_ints(code));
    const Floats error = subtract(multiply(subtract(code, zeros), scales), weights);
    errors = multiply_add(error, error, errors);
    powers = multiply_add(weights, weights, powers);
  }
}

// Groups [begin, end) of a row. `sums` become the squared errors and squared weights. Returns 1 where a weight is
// infinite or no number, 2 where a scale is, as a float16.
int64_t encode_span(const Grouping& of, int64_t row, int64_t begin, int64_t end, float* scratch, double* sums) {
  const int64_t groups = end - begin, size = (of.group + 15) / 16 * 16;
  const int64_t first = begin * of.group, last = end * of.group < of.width ? end * of.group : of.width;
  float* padded = scratch;
  uint8_t* codes = reinterpret_cast<uint8_t*>(padded + groups * size);
  float* scales = padded + groups * size + (groups * size + 3) / 4;
  float* inverses = scales + groups + 16;
  float* zeros = inverses + groups + 16;
  float* lows = zeros + groups + 16;
  float* highs = lows + groups + 16;
  const float* x = span_of_floats(of, row, first, last - first, groups * size, padded);
  const bool is_symmetric = of.zeros == nullptr, is_signed = of.bits == 8;
  const float center = is_signed ? 0.0f : static_cast<float>(1 << (of.bits - 1));
  const float low = is_signed ? -127.0f : 0.0f;
  const float high = is_signed ? 127.0f : static_cast<float>((1 << of.bits) - 1);
  const float steps = 1.0f / (is_symmetric ? (is_signed ? 127.0f : center - 0.5f) : high);
  for (int64_t group = 0; group < groups; ++group) {
    const float* from = x + group * size;
    if (is_symmetric) {
      Ints reach = int_zeros();
      for (int64_t i = 0; i < size; i += 16) reach = larger_magnitude(reach, load(from + i));
      const int32_t bits = largest(reach);
      __builtin_memcpy(highs + group, &bits, sizeof bits);
      lows[group] = 0.0f;
    } else {
      // Zero is inside, as the padding must have a code.
      Floats least = none(), most = least;
      for (int64_t i = 0; i < size; i += 16) {
        const Floats weights = load(from + i);
        least = minimum(weights, least);
        most = maximum(weights, most);
      }
      lows[group] = largest(subtract(none(), least));
      highs[group] = largest(most);
    }
  }
  const float smallest = of.wide ? kSmallestReach : kSmallestHalf;
  bool all_zero = true;
  for (int64_t i = 0; i < groups + 15; ++i) {
    if (i >= groups) lows[i] = highs[i] = 0.0f;
    const float reach = (highs[i] + lows[i]) * steps;
    scales[i] = reach >= kSmallestReach ? (reach > smallest ? reach : smallest) : 0.0f;
    all_zero = all_zero && highs[i] == 0.0f && lows[i] == 0.0f;
  }
  store_scales(of, row * of.groups + begin, groups, scales);
  int64_t problem = 0;
  for (int64_t i = 0; i < groups + 15; ++i) {
    if (!of.wide && !(scales[i] <= kLargestHalf)) problem = 2;
    inverses[i] = scales[i] > 0.0f ? 1.0f / scales[i] : 0.0f;
    zeros[i] = center;
    if (!is_symmetric) {
      const float zero = __builtin_nearbyintf(lows[i] * inverses[i]);
      zeros[i] = zero < high ? zero : high;
    }
  }
  if (!is_symmetric) store_zeros(of, row * of.groups + begin, groups, zeros);
  uint8_t* out = of.codes + row * of.row_bytes + first * of.bits / 8;
  Floats errors = none(), powers = errors;
  const bool direct = is_signed && groups * size == last - first;
  for (int64_t group = 0; group < groups; ++group) {
    encode_group(x + group * size, size, scales[group], inverses[group], zeros[group], low, high,
                 (direct ? out : codes) + group * size, errors, powers);
  }
  if (!direct) {
    const int64_t end_byte = end == of.groups ? of.row_bytes : end * of.group * of.bits / 8;
    const int64_t bytes = end_byte - first * of.bits / 8;
    if (is_signed) {
      __builtin_memcpy(out, codes, static_cast<size_t>(bytes));
    } else {
      pack_codes(codes, bytes * 8 / of.bits, of.bits, out);
    }
  }
  sums[0] = static_cast<double>(sum(errors));
  sums[1] = static_cast<double>(sum(powers));
  if ((sums[1] >= 0x1p-80 || all_zero) && sums[1] <= 0x1p127) return problem;
  // The squares are too large or too small for float32, or a weight is no finite number.
  sums[0] = sums[1] = 0.0;
  for (int64_t i = 0; i < last - first; ++i) {
    const int64_t group = i / size;
    const float code = __builtin_nearbyintf(x[i] * inverses[group]) + zeros[group];
    const double held = code > low ? (code < high ? code : high) : low;
    const double weight = x[i], error = (held - zeros[group]) * scales[group] - weight;
    sums[0] += error * error;
    sums[1] += weight * weight;
    if (!(__builtin_fabs(weight) <= 0x1.fffffep127)) return 1;
  }
  return problem;
}

void decode_span(const Grouping& of, int64_t row, int64_t begin, int64_t end, float* scratch) {
  const bool is_signed = of.bits == 8;
  const float center = is_signed ? 0.0f : static_cast<float>(1 << (of.bits - 1));
  const auto number = [&](const void* numbers, int64_t at) {
    if (of.wide) return static_cast<const float*>(numbers)[at];
    uint16_t halves[16] = {static_cast<const uint16_t*>(numbers)[at]};
    float value[16];
    store(value, load_half(halves));
    return value[0];
  };
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * of.group, last = first + of.group < of.width ? first + of.group : of.width;
    const int64_t count = last - first;
    const uint8_t* from = of.codes + row * of.row_bytes + first * of.bits / 8;
    if (is_signed) {
      __builtin_memcpy(codes, from, static_cast<size_t>(count));
    } else {
      for (int64_t i = 0; i < count; i += 8) {
        uint64_t x = 0;
        __builtin_memcpy(&x, from + i / 8 * of.bits, static_cast<size_t>(of.bits));
        x = spread(x, of.bits);
        __builtin_memcpy(codes + i, &x, sizeof x);
      }
    }
    const int64_t at = row * of.groups + group;
    const Floats scale = broadcast(number(of.scales, at));
    const Floats zero = broadcast(of.zeros == nullptr ? center : number(of.zeros, at));
    for (int64_t i = 0; i < count; i += 16) {
      const Floats value = multiply(scale, subtract(load_int8(codes + i), zero));
      const int64_t to = row * of.width + first + i;
      if (of.number == 0 && count - i >= 16) {
        store(static_cast<float*>(of.weights) + to, value);
      } else if (of.number == 0) {
        store_first(static_cast<float*>(of.weights) + to, value, static_cast<int>(count - i));
      } else {
        uint16_t halves[16];
        if (of.number == 1) {
          store_half(halves, value);
        } else {
          store_bfloat16(halves, value);
        }
        const int64_t some = count - i < 16 ? count - i : 16;
        __builtin_memcpy(static_cast<uint16_t*>(of.weights) + to, halves, static_cast<size_t>(some) * 2);
      }
    }
  }
}
