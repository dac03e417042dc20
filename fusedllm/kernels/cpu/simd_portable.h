// Sixteen lanes as plain arrays; compilers turn the loops into whatever vectors the processor has. Included by
// variant_portable.cc only, inside the variant's namespace.

constexpr const char* kName = "portable";
constexpr int kMostTokens = 4;
constexpr int kTogether = 1;
constexpr bool kSignedBytes = false;

constexpr int kTileRows = 2;
constexpr int kTileVectors = 1;
constexpr int kLoneKeys = 1;
constexpr int kLoneHeads = 1;
constexpr int kLonePairs = 1;

struct Floats { float lane[16]; };
struct Ints { int32_t lane[16]; };
struct Bytes { uint8_t lane[64]; };

template <typename Operation>
inline Floats each(const Operation& operation) {
  Floats result;
  for (int i = 0; i < 16; ++i) result.lane[i] = operation(i);
  return result;
}

template <typename Operation>
inline Ints each_int(const Operation& operation) {
  Ints result;
  for (int i = 0; i < 16; ++i) result.lane[i] = operation(i);
  return result;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
// IEEE 754 binary16, subnormals, infinities and what is no number included.
inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

// Rounded to the nearest, ties to even.
inline uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {
    // Below 2^-14. Adding one half leaves in the last bits as many units of 2^-24 as there are, rounded.
    const uint32_t units = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | units);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

inline float from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24, magnitude = code & 0x7f;
  // Units of 2^-9 below the least normal number; beyond, exponent and fraction stand as in a float but for the bias.
  const float small = static_cast<float>(magnitude) * 0.001953125f;
  const uint32_t bits = magnitude < 8 ? bits_of(small) : (magnitude << 20) + (120u << 23);
  return float_of(sign | (magnitude == 0x7f ? 0x7fc00000u : bits));
}

// Saturated to +-448, then rounded to the nearest, ties to even; what is no number stays none.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 24) & 0x80, most = 0x43e00000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  magnitude = magnitude < most ? magnitude : most;
  if (magnitude < 0x3c800000) {
    // Below 2^-6. Adding 2^14 leaves in the last bits as many units of 2^-9 as there are, rounded.
    return static_cast<uint8_t>(sign | (bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f)));
  }
  const uint32_t rounded = magnitude + 0x7ffff + ((magnitude >> 20) & 1);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120 << 3)));
}

inline Floats load(const float* p) { return each([p](int i) { return p[i]; }); }
inline void store(float* p, Floats x) {
  for (int i = 0; i < 16; ++i) p[i] = x.lane[i];
}
inline void store_first(float* p, Floats x, int count) {
  for (int i = 0; i < count; ++i) p[i] = x.lane[i];
}
inline Floats load_first(const float* p, int count) {
  return each([=](int i) { return i < count ? p[i] : 0.0f; });
}
inline Floats zeros() { return each([](int) { return 0.0f; }); }
inline Floats broadcast(float x) { return each([x](int) { return x; }); }
inline Floats load_half(const uint16_t* p) { return each([p](int i) { return from_half(p[i]); }); }
inline Floats load_bfloat16(const uint16_t* p) {
  return each([p](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline void load_bfloat16(const uint16_t* p, Floats (&x)[2]) {
  x[0] = each([p](int i) { return float_of(static_cast<uint32_t>(p[2 * i]) << 16); });
  x[1] = each([p](int i) { return float_of(static_cast<uint32_t>(p[2 * i + 1]) << 16); });
}
inline void split_pairs(Floats (&x)[2]) {
  const Floats a = x[0], b = x[1];
  x[0] = each([&](int i) { return i < 8 ? a.lane[2 * i] : b.lane[2 * i - 16]; });
  x[1] = each([&](int i) { return i < 8 ? a.lane[2 * i + 1] : b.lane[2 * i - 15]; });
}
inline void join_pairs(Floats (&x)[2]) {
  const Floats a = x[0], b = x[1];
  x[0] = each([&](int i) { return i % 2 ? b.lane[i / 2] : a.lane[i / 2]; });
  x[1] = each([&](int i) { return i % 2 ? b.lane[8 + i / 2] : a.lane[8 + i / 2]; });
}
inline void store_bfloat16(uint16_t* p, Floats x) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = bits_of(x.lane[i]);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    p[i] = static_cast<uint16_t>((x.lane[i] != x.lane[i] ? 0x7fc00000u : rounded) >> 16);
  }
}
inline void store_half(uint16_t* p, Floats x) {
  for (int i = 0; i < 16; ++i) p[i] = to_half(x.lane[i]);
}
inline Floats load_e4m3(const uint8_t* p) { return each([p](int i) { return from_e4m3(p[i]); }); }
inline void store_e4m3(uint8_t* p, Floats x) {
  for (int i = 0; i < 16; ++i) p[i] = to_e4m3(x.lane[i]);
}
inline Floats load_int8(const int8_t* p) { return each([p](int i) { return static_cast<float>(p[i]); }); }
inline Floats round_even(Floats x) {
  return each([x](int i) { return __builtin_nearbyintf(x.lane[i]); });
}
inline void store_int8(int8_t* p, Floats x) {
  const Floats rounded = round_even(x);
  for (int i = 0; i < 16; ++i) {
    const float r = rounded.lane[i];
    p[i] = static_cast<int8_t>(r < -128.0f ? -128.0f : (r > 127.0f ? 127.0f : r));
  }
}
inline Floats add(Floats a, Floats b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Floats subtract(Floats a, Floats b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Floats multiply(Floats a, Floats b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Floats divide(Floats a, Floats b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
// As the processors' own instruction has it: the second where either is no number.
inline Floats maximum(Floats a, Floats b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats minimum(Floats a, Floats b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline float sum(Floats x) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x.lane[i] += x.lane[i + step];
  }
  return x.lane[0];
}
inline float largest(Floats x) {
  for (int i = 1; i < 16; ++i) x.lane[0] = x.lane[i] > x.lane[0] ? x.lane[i] : x.lane[0];
  return x.lane[0];
}
inline Floats scale_by_power(Floats x, Floats n) {
  // In two halves, so that neither power leaves the range of a normal number for n of -252 to 254.
  return each([&](int i) {
    const int32_t whole = static_cast<int32_t>(n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f), half = whole >> 1;
    return x.lane[i] * float_of(static_cast<uint32_t>(half + 127) << 23) *
           float_of(static_cast<uint32_t>(whole - half + 127) << 23);
  });
}
inline Floats keep_first(Floats x, int count, float other) {
  return each([&](int i) { return i < count ? x.lane[i] : other; });
}
inline Floats keep_from(Floats x, int first, float other) {
  return each([&](int i) { return i < first ? other : x.lane[i]; });
}
inline Floats clear_where_less(Floats x, Floats a, Floats b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? 0.0f : x.lane[i]; });
}
inline void transpose(Floats (&x)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float other = x[i].lane[j];
      x[i].lane[j] = x[j].lane[i];
      x[j].lane[i] = other;
    }
  }
}
inline Floats sums(const Floats (&x)[16]) {
  return each([&](int i) { return sum(x[i]); });
}
inline uint32_t greater(Floats x, Floats y) {
  uint32_t result = 0;
  for (int i = 0; i < 16; ++i) result |= static_cast<uint32_t>(x.lane[i] > y.lane[i]) << i;
  return result;
}

inline Ints int_zeros() { return each_int([](int) { return 0; }); }
inline Ints larger_magnitude(Ints so_far, Floats x) {
  return each_int([&](int i) {
    const int32_t bits = static_cast<int32_t>(bits_of(x.lane[i]) & 0x7fffffffu);
    return bits > so_far.lane[i] ? bits : so_far.lane[i];
  });
}
inline int32_t largest(Ints x) {
  for (int i = 1; i < 16; ++i) x.lane[0] = x.lane[i] > x.lane[0] ? x.lane[i] : x.lane[0];
  return x.lane[0];
}
inline int32_t sum(Ints x) {
  for (int i = 1; i < 16; ++i) x.lane[0] += x.lane[i];
  return x.lane[0];
}
inline Ints to_ints(Floats x) {
  const Floats rounded = round_even(x);
  return each_int([&](int i) { return static_cast<int32_t>(rounded.lane[i]); });
}
inline Floats to_floats(Ints x) { return each([&](int i) { return static_cast<float>(x.lane[i]); }); }
// Modulo 2^32, as the processors' instructions have it; the language defines that of unsigned numbers only.
inline int32_t wrapped(uint32_t x) { return static_cast<int32_t>(x); }
inline uint32_t unsigned_of(int32_t x) { return static_cast<uint32_t>(x); }
inline Ints add(Ints a, Ints b) {
  return each_int([&](int i) { return wrapped(unsigned_of(a.lane[i]) + unsigned_of(b.lane[i])); });
}
inline Ints subtract(Ints a, Ints b) {
  return each_int([&](int i) { return wrapped(unsigned_of(a.lane[i]) - unsigned_of(b.lane[i])); });
}
inline Ints maximum(Ints a, Ints b) { return each_int([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Ints broadcast_int(int32_t x) { return each_int([&](int) { return x; }); }
template <int kBits>
inline Ints shift_left(Ints x) { return each_int([&](int i) { return x.lane[i] * (1 << kBits); }); }
template <int kBits>
inline Ints shift_right(Ints x) { return each_int([&](int i) { return x.lane[i] >> kBits; }); }
inline void store_int8(int8_t* p, Ints x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.lane[i]);
}

inline Bytes load_bytes(const uint8_t* p) {
  Bytes result;
  __builtin_memcpy(result.lane, p, 64);
  return result;
}
inline Bytes low_nibbles(Bytes x) {
  for (int i = 0; i < 64; ++i) x.lane[i] &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (int i = 0; i < 64; ++i) x.lane[i] = static_cast<uint8_t>(x.lane[i] >> 4);
  return x;
}
inline Bytes with_fifth_bits(Bytes x, const uint8_t* p) {
  for (int i = 0; i < 64; ++i) x.lane[i] = static_cast<uint8_t>(x.lane[i] + (((p[i / 8] >> (i % 8)) & 1) << 4));
  return x;
}
inline Ints dot_one_group(const Bytes (&weights)[8], const int8_t* x) {
  Ints result = int_zeros();
  for (int j = 0; j < 8; ++j) {
    for (int row = 0; row < 16; ++row) {
      int32_t total = 0;
      for (int i = 0; i < 4; ++i) total += weights[j].lane[4 * row + i] * x[4 * j + i];
      result.lane[row] += total;
    }
  }
  return result;
}

template <int kBits, int kCount>
inline void dot_group(const Bytes (&weights)[8], const int8_t* x, Ints* sums) {
  for (int t = 0; t < kCount; ++t) sums[t] = add(sums[t], dot_one_group(weights, x + kGroup * t));
}

struct Scales { Floats value; };
inline Scales scales_of(Floats value) { return {value}; }
inline Floats times_power(const Scales& scales, const float* power) { return multiply(scales.value, broadcast(*power)); }

inline Ints load_ints(const int32_t* p) {
  Ints result;
  __builtin_memcpy(result.lane, p, sizeof result.lane);
  return result;
}
inline void store_ints(int32_t* p, Ints x) { __builtin_memcpy(p, x.lane, sizeof x.lane); }
inline Ints load_first_ints(const int32_t* p, int count) {
  return each_int([&](int i) { return i < count ? p[i] : 0; });
}
inline void store_first_ints(int32_t* p, Ints x, int count) {
  for (int i = 0; i < count; ++i) p[i] = x.lane[i];
}

// Products modulo 2^32 (ring_kernel.h): one limb, the number itself.
using Limb = int32_t;
constexpr int kLimbs = 1;
constexpr int kLimbBits = 32;
constexpr int kRingColumns = 16;
constexpr int kRingTokens = 2;
constexpr int kRingRows = 2;
constexpr int kLoneRingRows = 4;
using LimbVector = Ints;
using RingWeights = Ints;
using RingSum = Ints;
inline LimbVector load_limbs(const Limb* p) { return load_ints(p); }
inline RingWeights load_ring_weights(const int8_t* p) {
  return each_int([&](int i) { return static_cast<int32_t>(p[i]); });
}
inline RingWeights load_first_ring_weights(const int8_t* p, int count) {
  return each_int([&](int i) { return i < count ? static_cast<int32_t>(p[i]) : 0; });
}
inline RingSum ring_zeros() { return int_zeros(); }
inline RingSum ring_dot(RingSum sum, LimbVector x, RingWeights weights) {
  return each_int([&](int i) {
    return wrapped(unsigned_of(sum.lane[i]) + unsigned_of(x.lane[i]) * unsigned_of(weights.lane[i]));
  });
}
inline int32_t ring_total(const RingSum* sums) {
  uint32_t total = 0;
  for (int i = 0; i < 16; ++i) total += unsigned_of(sums[0].lane[i]);
  return wrapped(total);
}
