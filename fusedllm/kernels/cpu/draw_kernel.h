// Passes over a row of logits: its largest, its exponentials, who is above a threshold, and the mass of those who stay.
// Included by all_kernels.h.

float largest_of(const float* row, int64_t size) {
  Floats first = broadcast(-3.402823466e38f), second = first;
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    first = maximum(load(row + i), first);
    second = maximum(load(row + i + 16), second);
  }
  float result = largest(maximum(first, second));
  for (; i < size; ++i) result = row[i] > result ? row[i] : result;
  return result;
}

float exponentials_of(const float* row, int64_t size, float largest, float inverse_temperature, float* out) {
  const Floats shift = broadcast(largest), factor = broadcast(inverse_temperature);
  Floats total = zeros();
  for (int64_t i = 0; i < size; i += 16) {
    const int count = size - i < 16 ? static_cast<int>(size - i) : 16;
    const Floats terms = exp(multiply(subtract(load_first(row + i, count), shift), factor));
    store_first(out + i, terms, count);
    total = add(total, keep_first(terms, count, 0.0f));
  }
  return sum(total);
}

int64_t collect_above(const float* row, int64_t begin, int64_t end, float threshold, int32_t* found, int* count,
                      int capacity) {
  const Floats least = broadcast(threshold);
  int64_t i = begin;
  for (; i < end && *count + 16 <= capacity; i += 16) {
    const int lanes = end - i < 16 ? static_cast<int>(end - i) : 16;
    const Floats values = lanes == 16 ? load(row + i) : keep_first(load_first(row + i, lanes), lanes, threshold);
    for (uint32_t bits = greater(values, least); bits != 0; bits &= bits - 1) {
      found[(*count)++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
    }
  }
  return i < end ? i : end;
}

float mass_from(const float* row, const float* mass, int64_t size, float threshold) {
  const Floats least = broadcast(threshold);
  Floats total = zeros();
  for (int64_t i = 0; i < size; i += 16) {
    const int count = size - i < 16 ? static_cast<int>(size - i) : 16;
    const Floats terms = clear_where_less(load_first(mass + i, count), load_first(row + i, count), least);
    total = add(total, keep_first(terms, count, 0.0f));
  }
  return sum(total);
}
