// Exponentials of sixteen floats, to about 2e-7 of the result. Included by all_kernels.h.
//
// What would be below the least normal number is zero: subnormal numbers slow a processor down. What is no number stays
// none.

// 2^fraction * 2^whole for fractions of -0.5 to 0.5; zero where `x`, their sum, is too small.
inline Floats power_of_parts(Floats fraction, Floats whole, Floats x) {
  // The polynomial of least relative error (7.5e-8), found with Remez' algorithm.
  Floats p = broadcast(0.0013276472f);
  p = multiply_add(p, fraction, broadcast(0.0096755410f));
  p = multiply_add(p, fraction, broadcast(0.0555071309f));
  p = multiply_add(p, fraction, broadcast(0.2402212024f));
  p = multiply_add(p, fraction, broadcast(0.6931469440f));
  p = multiply_add(p, fraction, broadcast(1.0000001192f));
  return clear_where_less(scale_by_power(p, whole), x, broadcast(-126.0f));
}

// Rounded to a whole number, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits behind the point.
inline Floats nearest_whole(Floats x) {
  const Floats shift = broadcast(12582912.0f);
  return subtract(add(x, shift), shift);
}

// 2^x for x of at most 128.
inline Floats exp2(Floats x) {
  // The bound comes first: of two numbers one of which is none, `maximum` takes the second.
  const Floats bounded = maximum(broadcast(-150.0f), x);
  const Floats whole = nearest_whole(bounded);
  return power_of_parts(subtract(bounded, whole), whole, bounded);
}

// e^x.
inline Floats exp(Floats x) {
  constexpr float kLog2e = 1.44269504f;
  const Floats bounded = minimum(broadcast(100.0f), maximum(broadcast(-100.0f), x));
  const Floats whole = nearest_whole(multiply(bounded, broadcast(kLog2e)));
  // log(2) in two parts, the first of so few bits that its product with `whole` is exact.
  Floats rest = multiply_add(whole, broadcast(-0.693145752f), bounded);
  rest = multiply_add(whole, broadcast(-1.42860677e-6f), rest);
  const Floats fraction = multiply(rest, broadcast(kLog2e));
  return power_of_parts(fraction, whole, add(fraction, whole));
}
