// Sixteen lanes in one AVX-512 register. Included by variant_avx512.cc and variant_avx512bf16.cc only, inside the
// variant's namespace.

#if defined(__AVX512BF16__)
constexpr const char* kName = "avx512bf16";
#else
constexpr const char* kName = "avx512";
#endif
// Blocks of tokens in a product: as many sums as fit into registers beside eight of weights.
constexpr int kMostTokens = 16;
// Tokens whose integer sums are made side by side.
constexpr int kTogether = 4;
// Codes of eight bits are taken as they are: the product's first operand is unsigned.
constexpr bool kSignedBytes = false;

// Attention: a tile of this many rows and vectors has its sums in registers, beside one row of vectors; and so have the
// keys, heads and pairs of vectors that a lone query takes at once.
constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;
constexpr int kLoneKeys = 4;
constexpr int kLoneHeads = 4;
constexpr int kLonePairs = 2;

using Floats = __m512;  // 16 float32
using Ints = __m512i;   // 16 int32
using Bytes = __m512i;  // 64 uint8

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
// The first `count` lanes.
inline void store_first(float* p, Floats x, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
}
inline Floats load_first(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_bfloat16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
// 32 numbers in two vectors, those of even and those of odd place: no number has to cross to another lane.
inline void load_bfloat16(const uint16_t* p, Floats (&x)[2]) {
  const __m512i pairs = _mm512_loadu_si512(p);
  x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  x[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// From 32 in their order to those of even and those of odd place, and back.
inline void split_pairs(Floats (&x)[2]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Floats first = x[0];
  x[0] = _mm512_permutex2var_ps(first, even, x[1]);
  x[1] = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), x[1]);
}
inline void join_pairs(Floats (&x)[2]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Floats even = x[0];
  x[0] = _mm512_permutex2var_ps(even, low, x[1]);
  x[1] = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), x[1]);
}
// Rounded to the nearest, ties to even; what is no number stays none.
inline void store_bfloat16(uint16_t* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_half(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Sixteen int8 as floats, and back: rounded to the nearest, saturated.
inline Floats load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_int8(int8_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
// Sixteen codes of e4m3 as floats. Moved by seven bits a code is a binary16 2^-8 as large, and the one that is no
// number is none there either once the highest bit of the exponent is set, into which adding one to the code carries.
// By way of float32 the small ones would be subnormal, which XLA has told its threads' processors to take as zero.
inline Floats load_e4m3(const uint8_t* p) {
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  const __m256i next = _mm256_add_epi16(moved, _mm256_set1_epi16(0x80));
  const __m256i carry = _mm256_and_si256(next, _mm256_set1_epi16(0x4000));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(moved, carry)), _mm512_set1_ps(256.0f));
}
// Saturated to +-448, then rounded to the nearest, ties to even; what is no number stays none.
inline void store_e4m3(uint8_t* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i most = _mm512_set1_epi32(0x43e00000), least_normal = _mm512_set1_epi32(0x3c800000);
  const __m512i magnitude = _mm512_min_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), most);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(magnitude, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  __m512i codes = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  // Adding 2^14 leaves in the last bits as many units of 2^-9 as there are, rounded.
  const Floats unit = _mm512_set1_ps(16384.0f);
  const __m512i units = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), unit));
  codes = _mm512_mask_sub_epi32(codes, _mm512_cmplt_epi32_mask(magnitude, least_normal), units,
                                _mm512_castps_si512(unit));
  codes = _mm512_mask_mov_epi32(codes, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_or_si512(codes, sign)));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
// a * b + c
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats round_even(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n.
inline Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
// Lanes from `count` on become `other`.
inline Floats keep_first(Floats x, int count, float other) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>((1u << count) - 1), x);
}
// Lanes before `first` become `other`.
inline Floats keep_from(Floats x, int first, float other) {
  return _mm512_mask_mov_ps(x, static_cast<__mmask16>((1u << first) - 1), _mm512_set1_ps(other));
}
// Zero where a < b.
inline Floats clear_where_less(Floats x, Floats a, Floats b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}
// Lane j of x[i] becomes lane i of x[j].
inline void transpose(Floats (&x)[16]) {
  Floats y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  const auto low = [](Floats a, Floats b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](Floats a, Floats b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = low(y[i], y[i + 2]);
    x[i + 1] = high(y[i], y[i + 2]);
    x[i + 2] = low(y[i + 1], y[i + 3]);
    x[i + 3] = high(y[i + 1], y[i + 3]);
  }
  // Now quarter c of x[4 a + b] holds column 4 c + b of the rows 4 a to 4 a + 3: quarters remain to be moved.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    y[b] = _mm512_shuffle_f32x4(x[b], x[4 + b], 0x88);
    y[4 + b] = _mm512_shuffle_f32x4(x[b], x[4 + b], 0xdd);
    y[8 + b] = _mm512_shuffle_f32x4(x[8 + b], x[12 + b], 0x88);
    y[12 + b] = _mm512_shuffle_f32x4(x[8 + b], x[12 + b], 0xdd);
  }
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    x[b] = _mm512_shuffle_f32x4(y[b], y[8 + b], 0x88);
    x[4 + b] = _mm512_shuffle_f32x4(y[4 + b], y[12 + b], 0x88);
    x[8 + b] = _mm512_shuffle_f32x4(y[b], y[8 + b], 0xdd);
    x[12 + b] = _mm512_shuffle_f32x4(y[4 + b], y[12 + b], 0xdd);
  }
}
// Lane i is the sum of x[i]: sums of halves, quarters, eighths and single lanes, two vectors becoming one at each step.
inline Floats sums(Floats (&x)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, x[i], x[i + 8]), _mm512_shuffle_f32x4(x[i], x[i + 8], 0x4e));
  }
  const __m512i quarters = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Floats crossed = _mm512_permutex2var_ps(x[i], quarters, x[i + 4]);
    x[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, x[i], x[i + 4]), crossed);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    x[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, x[i], x[i + 2]), _mm512_shuffle_ps(x[i], x[i + 2], 0x4e));
  }
  const __m512i single = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, x[0], x[1]), _mm512_permutex2var_ps(x[0], single, x[1]));
}
// One bit a lane: x > y.
inline uint32_t greater(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }

inline Ints int_zeros() { return _mm512_setzero_si512(); }
// Of the magnitudes' bit patterns, which order as the magnitudes do and end with infinity and what is no number.
inline Ints larger_magnitude(Ints so_far, Floats x) {
  return _mm512_max_epi32(so_far, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
inline int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x); }
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints maximum(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
template <int kBits>
inline Ints shift_left(Ints x) { return _mm512_slli_epi32(x, kBits); }
template <int kBits>
inline Ints shift_right(Ints x) { return _mm512_srai_epi32(x, kBits); }
inline void store_int8(int8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
// x with 16 added to each byte whose bit in `p` is set.
inline Bytes with_fifth_bits(Bytes x, const uint8_t* p) {
  uint64_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return _mm512_mask_add_epi8(x, _cvtu64_mask64(bits), x, _mm512_set1_epi8(16));
}
#if defined(__AVX512BF16__)
// 32 elements as sixteen pairs of bfloat16, rounded to the nearest; and to each lane's total its pair of products with
// the one pair at `x`.
inline Floats pairs_of(Floats low, Floats high) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(high, low);
  Floats result;
  __builtin_memcpy(&result, &pairs, sizeof result);
  return result;
}
inline Floats add_pair_products(Floats totals, Floats pairs, const float* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(totals) : "v"(pairs), "m"(*x));
  return totals;
}
#endif

// Scales of sixteen rows, to be multiplied with powers of two in the integer units, which have less to do than those
// that multiply: their exponents are added, where the scale is neither zero nor infinite nor none.
struct Scales {
  Floats value;
  Ints lowered;
  __mmask16 normal;
};
inline Scales scales_of(Floats value) {
  const Ints bits = _mm512_castps_si512(value);
  const __mmask16 other = _mm512_fpclass_ps_mask(value, 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x80);
  return {value, _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f800000)), static_cast<__mmask16>(~other)};
}
inline Floats times_power(const Scales& scales, const float* power) {
  int32_t bits;
  __builtin_memcpy(&bits, power, sizeof bits);
  return _mm512_castsi512_ps(_mm512_mask_add_epi32(_mm512_castps_si512(scales.value), scales.normal, scales.lowered,
                                                   _mm512_set1_epi32(bits)));
}

// Adds to `sums` those over one group for kCount tokens: `weights[j]` holds elements 4 j to 4 j + 3 of sixteen rows, `x`
// the 32 codes of one token after the other. The tokens take turns, as each sum waits five cycles for the last.
template <int kBits, int kCount>
inline void dot_group(const Bytes (&weights)[8], const int8_t* x, Ints* sums) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) {
      // Written out, as compilers load the four codes with an instruction of its own: half as many again.
      asm("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(sums[t])
          : "v"(weights[j]), "m"(*reinterpret_cast<const int32_t*>(x + kGroup * t + 4 * j)));
    }
  }
}

inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints load_first_ints(const int32_t* p, int count) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p);
}
inline void store_first_ints(int32_t* p, Ints x, int count) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << count) - 1), x);
}

// Products modulo 2^32 (ring_kernel.h): four limbs of a byte. The instruction takes unsigned bytes on one side and
// signed ones on the other, which is what limbs and weights are, and does not saturate.
using Limb = uint8_t;
constexpr int kLimbs = 4;
constexpr int kLimbBits = 8;
constexpr int kRingColumns = 64;
// 24 sums, three vectors of weights and one of limbs.
constexpr int kRingTokens = 2;
constexpr int kRingRows = 3;
constexpr int kLoneRingRows = 4;
using LimbVector = __m512i;
using RingWeights = __m512i;
using RingSum = __m512i;
inline LimbVector load_limbs(const Limb* p) { return _mm512_loadu_si512(p); }
inline RingWeights load_ring_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
inline RingWeights load_first_ring_weights(const int8_t* p, int count) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, p);
}
inline RingSum ring_zeros() { return _mm512_setzero_si512(); }
inline RingSum ring_dot(RingSum sum, LimbVector x, RingWeights weights) {
  // Written out, as compilers copy a sum before the instruction that adds to it.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
  return sum;
}
inline int32_t ring_total(const RingSum* sums) {
  const __m512i odd = _mm512_add_epi32(sums[1], _mm512_slli_epi32(sums[3], 16));
  const __m512i even = _mm512_add_epi32(sums[0], _mm512_slli_epi32(sums[2], 16));
  const __m512i all = _mm512_add_epi32(even, _mm512_slli_epi32(odd, 8));
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
