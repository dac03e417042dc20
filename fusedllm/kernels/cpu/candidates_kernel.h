// Passes over a row of logits: its largest, the sum of its exponentials, and who is above a threshold. Included by
// all_kernels.h.

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

float sum_of_exponentials(const float* row, int64_t size, float largest, float inverse_temperature) {
  const Floats shift = broadcast(largest), factor = broadcast(inverse_temperature);
  Floats first = zeros(), second = zeros();
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    first = add(first, exp(multiply(subtract(load(row + i), shift), factor)));
    second = add(second, exp(multiply(subtract(load(row + i + 16), shift), factor)));
  }
  first = add(first, second);
  for (; i < size; i += 16) {
    const int count = size - i < 16 ? static_cast<int>(size - i) : 16;
    const Floats terms = exp(multiply(subtract(load_first(row + i, count), shift), factor));
    first = add(first, keep_first(terms, count, 0.0f));
  }
  return sum(first);
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
