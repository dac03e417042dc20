// Sixteen lanes in two AVX2 registers. Included by variant_avx2.cc only, inside the variant's namespace.

constexpr const char* kName = "avx2";
constexpr int kMostTokens = 4;
constexpr int kTogether = 1;
// Codes of eight bits are made signed: two products of an unsigned byte overflow the instruction's sixteen bits.
constexpr bool kSignedBytes = true;

constexpr int kTileRows = 6;
constexpr int kTileVectors = 1;
constexpr int kLoneKeys = 2;
constexpr int kLoneHeads = 2;
constexpr int kLonePairs = 1;

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
struct Bytes { __m256i low, high; };

// All bits of the first `count` lanes.
inline Ints first_lanes(int count) {
  const __m256i counts = _mm256_set1_epi32(count);
  return {_mm256_cmpgt_epi32(counts, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(counts, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store_first(float* p, Floats x, int count) {
  const Ints mask = first_lanes(count);
  _mm256_maskstore_ps(p, mask.low, x.low);
  _mm256_maskstore_ps(p + 8, mask.high, x.high);
}
inline Floats load_first(const float* p, int count) {
  const Ints mask = first_lanes(count);
  return {_mm256_maskload_ps(p, mask.low), _mm256_maskload_ps(p + 8, mask.high)};
}
inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256 widen_bfloat16(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load_bfloat16(const uint16_t* p) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  return {widen_bfloat16(_mm_loadu_si128(halves)), widen_bfloat16(_mm_loadu_si128(halves + 1))};
}
inline void load_bfloat16(const uint16_t* p, Floats (&x)[2]) {
  const __m256i* pairs = reinterpret_cast<const __m256i*>(p);
  const __m256i low = _mm256_loadu_si256(pairs), high = _mm256_loadu_si256(pairs + 1);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  x[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  x[1] = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
// Lanes of even (0x88) or odd (0xdd) place of both vectors.
template <int kWhich>
inline __m256 every_second(Floats x) {
  const __m256 mixed = _mm256_shuffle_ps(x.low, x.high, kWhich);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
inline void split_pairs(Floats (&x)[2]) {
  const Floats first = x[0], second = x[1];
  x[0] = {every_second<0x88>(first), every_second<0x88>(second)};
  x[1] = {every_second<0xdd>(first), every_second<0xdd>(second)};
}
inline Floats alternate(__m256 even, __m256 odd) {
  const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
inline void join_pairs(Floats (&x)[2]) {
  const Floats even = x[0], odd = x[1];
  x[0] = alternate(even.low, odd.low);
  x[1] = alternate(even.high, odd.high);
}
inline __m256i rounded_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan)), 16);
}
inline void store_bfloat16(uint16_t* p, Floats x) {
  // Packing works inside each half of a register, which the permutation undoes.
  const __m256i packed = _mm256_packus_epi32(rounded_bfloat16(x.low), rounded_bfloat16(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_half(uint16_t* p, Floats x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m128i* halves = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(x.low, kMode));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.high, kMode));
}
inline Floats load_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// As in simd_avx512.h: by way of binary16, so that no subnormal float32 is met.
inline Floats load_e4m3(const uint8_t* p) {
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  const __m256i next = _mm256_add_epi16(moved, _mm256_set1_epi16(0x80));
  const __m256i halves = _mm256_or_si256(moved, _mm256_and_si256(next, _mm256_set1_epi16(0x4000)));
  const __m256 power = _mm256_set1_ps(256.0f);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), power),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), power)};
}
inline __m256i codes_of_e4m3(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i most = _mm256_set1_epi32(0x43e00000), least_normal = _mm256_set1_epi32(0x3c800000);
  const __m256i magnitude = _mm256_min_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), most);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(magnitude, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
  // Adding 2^14 leaves in the last bits as many units of 2^-9 as there are, rounded.
  const __m256 unit = _mm256_set1_ps(16384.0f);
  const __m256i sum = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), unit));
  const __m256i small = _mm256_sub_epi32(sum, _mm256_castps_si256(unit));
  __m256i codes = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(least_normal, magnitude));
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  codes = _mm256_blendv_epi8(codes, _mm256_set1_epi32(0x7f), _mm256_castps_si256(is_nan));
  return _mm256_or_si256(codes, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
}
// Saturated to +-448, then rounded to the nearest, ties to even; what is no number stays none.
inline void store_e4m3(uint8_t* p, Floats x) {
  const __m256i mixed = _mm256_packus_epi32(codes_of_e4m3(x.low), codes_of_e4m3(x.high));
  const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats round_even(Floats x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kMode), _mm256_round_ps(x.high, kMode)};
}
// In two halves, so that neither power leaves the range of a normal number for n of -252 to 254.
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline __m256 scale_by_power(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
inline Floats scale_by_power(Floats x, Floats n) {
  return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)};
}
inline Floats keep_first(Floats x, int count, float other) {
  const Ints mask = first_lanes(count);
  const __m256 fill = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(fill, x.low, _mm256_castsi256_ps(mask.low)),
          _mm256_blendv_ps(fill, x.high, _mm256_castsi256_ps(mask.high))};
}
inline Floats keep_from(Floats x, int first, float other) {
  const Ints mask = first_lanes(first);
  const __m256 fill = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(x.low, fill, _mm256_castsi256_ps(mask.low)),
          _mm256_blendv_ps(x.high, fill, _mm256_castsi256_ps(mask.high))};
}
inline Floats clear_where_less(Floats x, Floats a, Floats b) {
  return {_mm256_and_ps(x.low, _mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ)),
          _mm256_and_ps(x.high, _mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ))};
}
inline void transpose_eight(__m256 (&x)[8]) {
  __m256 y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 top = x[i], bottom = x[i + 4];
    x[i] = _mm256_permute2f128_ps(top, bottom, 0x20);
    x[i + 4] = _mm256_permute2f128_ps(top, bottom, 0x31);
  }
}
inline void transpose(Floats (&x)[16]) {
  __m256 a[8], b[8];
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = half == 0 ? x[i].low : x[i + 8].low;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) b[i] = half == 0 ? x[i].high : x[i + 8].high;
    transpose_eight(a);
    transpose_eight(b);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      (half == 0 ? x[i].low : x[i + 8].low) = a[i];
      (half == 0 ? x[i].high : x[i + 8].high) = b[i];
    }
  }
  // The blocks off the diagonal have been transposed where they stood: they change places.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256 moved = x[i].high;
    x[i].high = x[i + 8].low;
    x[i + 8].low = moved;
  }
}
inline __m256 sums_of_eight(const Floats* x) {
  __m256 y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) y[i] = _mm256_add_ps(x[i].low, x[i].high);
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(y[4], y[5]), _mm256_hadd_ps(y[6], y[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
inline Floats sums(const Floats (&x)[16]) { return {sums_of_eight(x), sums_of_eight(x + 8)}; }
inline uint32_t greater(Floats x, Floats y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, _CMP_GT_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, _CMP_GT_OQ))) << 8;
}

inline Ints int_zeros() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints larger_magnitude(Ints so_far, Floats x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epi32(so_far.low, _mm256_and_si256(_mm256_castps_si256(x.low), magnitude)),
          _mm256_max_epi32(so_far.high, _mm256_and_si256(_mm256_castps_si256(x.high), magnitude))};
}
inline int32_t largest(Ints x) {
  const __m256i eight = _mm256_max_epi32(x.low, x.high);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline int32_t sum(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints subtract(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints maximum(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
inline Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int kBits>
inline Ints shift_left(Ints x) { return {_mm256_slli_epi32(x.low, kBits), _mm256_slli_epi32(x.high, kBits)}; }
template <int kBits>
inline Ints shift_right(Ints x) { return {_mm256_srai_epi32(x.low, kBits), _mm256_srai_epi32(x.high, kBits)}; }
// Saturated.
inline void store_int8(int8_t* p, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_int8(int8_t* p, Floats x) { store_int8(p, to_ints(x)); }

inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)});
}
// Sixteen in each byte whose bit of the 32 is set.
inline __m256i fifth_bits(const uint8_t* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), which);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
}
inline Bytes with_fifth_bits(Bytes x, const uint8_t* p) {
  return {_mm256_or_si256(x.low, fifth_bits(p)), _mm256_or_si256(x.high, fifth_bits(p + 4))};
}
inline __m256i four_codes(const int8_t* x) {
  int32_t codes;
  __builtin_memcpy(&codes, x, sizeof codes);
  return _mm256_set1_epi32(codes);
}
// Sums of products of bytes in 16 bits. Of codes below 32 (16) four (eight) such sums stay inside: 4 * 2 * 31 * 127.
template <int kBits>
inline Ints dot_one_group(const Bytes (&weights)[8], const int8_t* x) {
  const __m256i ones = _mm256_set1_epi16(1);
  Ints result = int_zeros();
  if constexpr (kBits == 8) {
    const __m256i sign = _mm256_set1_epi8(-128);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i four = four_codes(x + 4 * j);
      const auto dot = [&](__m256i codes) {
        const __m256i value = _mm256_xor_si256(codes, sign);
        return _mm256_madd_epi16(
            _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(four, value)), ones);
      };
      result = add(result, Ints{dot(weights[j].low), dot(weights[j].high)});
    }
  } else {
    constexpr int kInside = kBits == 4 ? 8 : 4;
#pragma GCC unroll 2
    for (int first = 0; first < 8; first += kInside) {
      __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 8
      for (int j = first; j < first + kInside; ++j) {
        const __m256i four = four_codes(x + 4 * j);
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(weights[j].low, four));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(weights[j].high, four));
      }
      result = add(result, Ints{_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)});
    }
  }
  return result;
}

template <int kBits, int kCount>
inline void dot_group(const Bytes (&weights)[8], const int8_t* x, Ints* sums) {
  for (int t = 0; t < kCount; ++t) sums[t] = add(sums[t], dot_one_group<kBits>(weights, x + kGroup * t));
}

struct Scales { Floats value; };
inline Scales scales_of(Floats value) { return {value}; }
inline Floats times_power(const Scales& scales, const float* power) { return multiply(scales.value, broadcast(*power)); }

inline Ints load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store_ints(int32_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.high);
}
inline Ints load_first_ints(const int32_t* p, int count) {
  const Ints mask = first_lanes(count);
  return {_mm256_maskload_epi32(p, mask.low), _mm256_maskload_epi32(p + 8, mask.high)};
}
inline void store_first_ints(int32_t* p, Ints x, int count) {
  const Ints mask = first_lanes(count);
  _mm256_maskstore_epi32(p, mask.low, x.low);
  _mm256_maskstore_epi32(p + 8, mask.high, x.high);
}

// Products modulo 2^32 (ring_kernel.h): two signed limbs of sixteen bits and widened weights, as sums of two products of
// bytes overflow this instruction set's sixteen bits. Half the instructions of 32-bit products.
using Limb = int16_t;
constexpr int kLimbs = 2;
constexpr int kLimbBits = 16;
constexpr int kRingColumns = 16;
constexpr int kRingTokens = 2;
constexpr int kRingRows = 2;
constexpr int kLoneRingRows = 4;
using LimbVector = __m256i;
using RingWeights = __m256i;
using RingSum = __m256i;
inline LimbVector load_limbs(const Limb* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline RingWeights load_ring_weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline RingWeights load_first_ring_weights(const int8_t* p, int count) {
  int8_t few[16] = {};
  __builtin_memcpy(few, p, static_cast<size_t>(count));
  return load_ring_weights(few);
}
inline RingSum ring_zeros() { return _mm256_setzero_si256(); }
inline RingSum ring_dot(RingSum sum, LimbVector x, RingWeights weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(x, weights));
}
inline int32_t ring_total(const RingSum* sums) {
  const __m256i eight = _mm256_add_epi32(sums[0], _mm256_slli_epi32(sums[1], 16));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
