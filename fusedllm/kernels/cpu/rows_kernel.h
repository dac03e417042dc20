// What is done to each row between two products: the norm, and the activation. Included by all_kernels.h.

void norm_rows(const float* x, const float* delta, const float* weight, float epsilon, int64_t width, int64_t first,
               int64_t last, float* total, float* normed) {
  for (int64_t row = first; row < last; ++row) {
    const float* source = x + row * width;
    if (delta != nullptr) {
      float* to = total + row * width;
      for (int64_t i = 0; i < width; i += 16) {
        const int count = width - i < 16 ? static_cast<int>(width - i) : 16;
        const Floats both = add(load_first(source + i, count), load_first(delta + row * width + i, count));
        store_first(to + i, both, count);
      }
      source = to;
    }
    Floats squares = zeros();
    for (int64_t i = 0; i < width; i += 16) {
      const Floats values = load_first(source + i, width - i < 16 ? static_cast<int>(width - i) : 16);
      squares = multiply_add(values, values, squares);
    }
    const Floats scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + epsilon));
    for (int64_t i = 0; i < width; i += 16) {
      const int count = width - i < 16 ? static_cast<int>(width - i) : 16;
      const Floats values = multiply(load_first(source + i, count), scale);
      store_first(normed + row * width + i, multiply(values, load_first(weight + i, count)), count);
    }
  }
}

// gate / (1 + e^-gate) * up
void swiglu(const float* gate, const float* up, int64_t first, int64_t last, float* out) {
  const Floats one = broadcast(1.0f);
  for (int64_t i = first; i < last; i += 16) {
    const int count = last - i < 16 ? static_cast<int>(last - i) : 16;
    const Floats value = load_first(gate + i, count);
    const Floats active = divide(value, add(one, exp(subtract(zeros(), value))));
    store_first(out + i, multiply(active, load_first(up + i, count)), count);
  }
}
