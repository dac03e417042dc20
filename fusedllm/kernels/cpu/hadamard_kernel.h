// Rows turned by Walsh-Hadamard matrices, in the order of additions of `kernels/walsh.py`. Included by all_kernels.h.
//
// A stage reads elements half a block apart and writes their sum and difference side by side, so that loads and stores
// are of whole vectors at every distance; the last stage leaves all in their order.

// Magnitudes below 2^-88 count as zero.
inline float or_zero(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = (bits & 0x7fffffffu) < 0x13800000u ? 0 : bits;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

template <bool kFirst, bool kLast>
void turn_stage(const float* __restrict from, int64_t half, float factor, float* __restrict to) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = kFirst ? or_zero(from[i]) : from[i], b = kFirst ? or_zero(from[i + half]) : from[i + half];
    to[2 * i] = kLast ? (a + b) * factor : a + b;
    to[2 * i + 1] = kLast ? (a - b) * factor : a - b;
  }
}

void turn(const float* x, int64_t width, int64_t block, float* scratch, float* out) {
  int stages = 0;
  while (int64_t{1} << stages < block) ++stages;
  float factor = stages % 2 ? 0.70710678f : 1.0f;
  for (int i = 0; i < stages / 2; ++i) factor *= 0.5f;
  const int64_t half = block / 2;
  for (; width > 0; width -= block, x += block, out += block) {
    if (stages == 0) {
      *out = or_zero(*x);
    } else if (stages == 1) {
      turn_stage<true, true>(x, half, factor, out);
    } else {
      // The last stage writes the result, and those before it take turns.
      float* to = stages % 2 ? out : scratch;
      turn_stage<true, false>(x, half, factor, to);
      for (int stage = 1; stage < stages; ++stage) {
        const float* from = to;
        to = from == out ? scratch : out;
        if (stage + 1 < stages) {
          turn_stage<false, false>(from, half, factor, to);
        } else {
          turn_stage<false, true>(from, half, factor, to);
        }
      }
    }
  }
}
