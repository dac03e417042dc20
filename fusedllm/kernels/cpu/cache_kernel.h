// Keys and values in pages: where a position's row lies, reading and writing rows, and the rotation before. Included by
// all_kernels.h.

template <CacheType kType>
struct Element {
  using Type = uint16_t;
};
template <>
struct Element<CacheType::kFloat32> {
  using Type = float;
};
template <>
struct Element<CacheType::kInt8> {
  using Type = int8_t;
};
template <>
struct Element<CacheType::kE4m3> {
  using Type = uint8_t;
};

// Sixteen numbers, or the first `count` and zeros; of int8 the codes.
template <CacheType kType>
inline Floats load_cached(const typename Element<kType>::Type* p) {
  if constexpr (kType == CacheType::kBfloat16) return load_bfloat16(p);
  if constexpr (kType == CacheType::kFloat16) return load_half(p);
  if constexpr (kType == CacheType::kFloat32) return load(p);
  if constexpr (kType == CacheType::kInt8) return load_int8(p);
  if constexpr (kType == CacheType::kE4m3) return load_e4m3(p);
}
template <CacheType kType>
inline Floats load_cached_first(const typename Element<kType>::Type* p, int count) {
  typename Element<kType>::Type padded[16] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(count) * sizeof *p);
  return load_cached<kType>(padded);
}

inline int64_t whole_vectors(int64_t count, int64_t vectors) {
  const int64_t lanes = 16 * vectors;
  return (count + lanes - 1) / lanes * lanes;
}

// Numbers of rows, in the whole of a layer's pages, of the positions of one sequence and kv head: row n holds elements
// n * head_dim and following, and has the n-th scale.
class CachedRows {
 public:
  CachedRows(const Attention& a, int64_t row, int64_t kv_head)
      : table_(a.page_table + row * a.table),
        page_size_(a.page_size),
        page_rows_(a.kv_heads * a.page_size),
        head_rows_(kv_head * a.page_size) {}

  int64_t operator[](int64_t position) const {
    return table_[position / page_size_] * page_rows_ + head_rows_ + position % page_size_;
  }

  // Of `count` positions from `first` on, each times `factor`; numbers past them repeat the last, up to `padded`.
  void list(int64_t first, int64_t count, int64_t padded, int64_t factor, int64_t* rows) const {
    int64_t page = first / page_size_, offset = first % page_size_, i = 0;
    while (i < count) {
      const int64_t base = table_[page] * page_rows_ + head_rows_ + offset;
      const int64_t here = page_size_ - offset < count - i ? page_size_ - offset : count - i;
      for (int64_t j = 0; j < here; ++j) rows[i + j] = (base + j) * factor;
      i += here;
      offset = 0;
      ++page;
    }
    for (; i < padded; ++i) rows[i] = rows[count - 1];
  }

 private:
  const int32_t* table_;
  int64_t page_size_;
  int64_t page_rows_;
  int64_t head_rows_;
};

// Elements i and i + half rotated as a pair and multiplied by `scale`.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t half, float scale, float* out) {
  const Floats factor = broadcast(scale);
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, multiply(subtract(multiply(a, c), multiply(b, s)), factor));
    store(out + half + i, multiply(add(multiply(b, c), multiply(a, s)), factor));
  }
  if (i < half) {
    const int rest = static_cast<int>(half - i);
    const Floats a = load_first(x + i, rest), b = load_first(x + half + i, rest);
    const Floats c = load_first(cos + i, rest), s = load_first(sin + i, rest);
    store_first(out + i, multiply(subtract(multiply(a, c), multiply(b, s)), factor), rest);
    store_first(out + half + i, multiply(add(multiply(b, c), multiply(a, s)), factor), rest);
  }
}

// A row of `width` floats into the cache; `x` is readable up to a multiple of sixteen, with zeros behind `width`.
template <CacheType kType>
inline void store_cached(const float* x, int64_t width, int64_t row, void* pages, float* scales) {
  using Type = typename Element<kType>::Type;
  Type* to = static_cast<Type*>(pages) + row * width;
  Floats inverse = broadcast(1.0f);
  if constexpr (kType == CacheType::kInt8) {
    Ints magnitude = int_zeros();
    for (int64_t i = 0; i < width; i += 16) magnitude = larger_magnitude(magnitude, load(x + i));
    const int32_t bits = largest(magnitude);
    float most;
    __builtin_memcpy(&most, &bits, sizeof most);
    const float scale = most * (1.0f / 127.0f);
    scales[row] = scale;
    // Where the scale is no number, or infinite, it alone makes what is read no number; the inverse of one below the
    // least normal number might be infinite.
    if (!(scale >= 1.17549435e-38f && scale <= 3.4028235e38f)) {
      for (int64_t i = 0; i < width; ++i) to[i] = 0;
      return;
    }
    inverse = broadcast(1.0f / scale);
  }
  const auto put = [&](Type* p, const float* from) {
    if constexpr (kType == CacheType::kBfloat16) store_bfloat16(p, load(from));
    if constexpr (kType == CacheType::kFloat16) store_half(p, load(from));
    if constexpr (kType == CacheType::kFloat32) store(p, load(from));
    if constexpr (kType == CacheType::kE4m3) store_e4m3(p, load(from));
    if constexpr (kType == CacheType::kInt8) {
      store_int8(p, minimum(broadcast(127.0f), maximum(broadcast(-127.0f), multiply(load(from), inverse))));
    }
  };
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) put(to + i, x + i);
  if (i < width) {
    Type padded[16];
    put(padded, x + i);
    __builtin_memcpy(to + i, padded, static_cast<size_t>(width - i) * sizeof *to);
  }
}

template <CacheType kType>
void write_cache_as(const Attention& a, int64_t first, int64_t last, float* scratch) {
  const int64_t width = a.head_dim, half = width / 2, padded = whole_vectors(width, 1);
  for (int64_t i = width; i < padded; ++i) scratch[i] = 0.0f;
  for (int64_t token = first; token < last; ++token) {
    const int64_t row = token / a.seq, position = a.start[row] + token % a.seq;
    if (position >= a.limit() || a.page_table[row * a.table + position / a.page_size] == kNullPage) continue;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t from = (token * a.kv_heads + head) * width;
      const int64_t to = CachedRows(a, row, head)[position];
      rotate(a.k + from, a.cos + token * half, a.sin + token * half, half, 1.0f, scratch);
      store_cached<kType>(scratch, width, to, a.k_pages, a.k_scales);
      __builtin_memcpy(scratch, a.v + from, static_cast<size_t>(width) * sizeof(float));
      store_cached<kType>(scratch, width, to, a.v_pages, a.v_scales);
    }
  }
}

// Rotates the keys of tokens [first, last), counted through the batch, and writes keys and values into their pages.
// `scratch` holds a head, up to a multiple of sixteen floats.
void write_cache(const Attention& a, int64_t first, int64_t last, float* scratch) {
  switch (a.type) {
    case CacheType::kBfloat16: return write_cache_as<CacheType::kBfloat16>(a, first, last, scratch);
    case CacheType::kFloat16: return write_cache_as<CacheType::kFloat16>(a, first, last, scratch);
    case CacheType::kFloat32: return write_cache_as<CacheType::kFloat32>(a, first, last, scratch);
    case CacheType::kInt8: return write_cache_as<CacheType::kInt8>(a, first, last, scratch);
    case CacheType::kE4m3: return write_cache_as<CacheType::kE4m3>(a, first, last, scratch);
  }
}
