// Attention of a query that is alone in its row, as in decode: each key and value is read once for all heads that share
// it, as it lies in the pages, and the memory is the limit. Included by all_kernels.h.
//
// Heads are met in pairs of vectors, 32 numbers. Of bfloat16 these are the numbers of even and those of odd place,
// which takes half as many instructions as keeping their order; queries are put into that order before, results back
// after.

// How many positions ahead memory is asked for: pages are too short for the processor to foresee what comes next, and
// more would find no place in its queue.
constexpr int64_t kAhead = 16;
constexpr int64_t kPair = 32;

// The next pair, or the first `count` of its numbers and zeros.
template <CacheType kType>
inline void load_pair(const typename Element<kType>::Type* p, Floats (&x)[2]) {
  if constexpr (kType == CacheType::kBfloat16) {
    load_bfloat16(p, x);
  } else {
    x[0] = load_cached<kType>(p);
    x[1] = load_cached<kType>(p + 16);
  }
}
template <CacheType kType>
inline void load_pair(const typename Element<kType>::Type* p, int64_t count, Floats (&x)[2]) {
  if (count >= kPair) return load_pair<kType>(p, x);
  typename Element<kType>::Type padded[kPair] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(count > 0 ? count : 0) * sizeof *p);
  load_pair<kType>(padded, x);
}

inline int64_t lone_stride(const Attention& a) { return whole_vectors(a.head_dim, 2 * kLonePairs); }

// For all heads the sums of weighted values, then for each the highest score and the sum of weights, among sixteen.
int64_t lone_partial_floats(const Attention& a) { return a.group() * (lone_stride(a) + 16); }

// Rotated queries; scores and then weights of a chunk's keys.
int64_t lone_scratch_floats(const Attention& a) { return a.group() * (lone_stride(a) + kChunk) + lone_stride(a); }

template <typename Type>
inline const Type* shifted(const Type* p, int64_t bytes) {
  return reinterpret_cast<const Type*>(reinterpret_cast<const char*>(p) + bytes);
}

// Asks for the memory of the pair at `p`.
template <typename Type>
inline void ask_for(const Type* p) {
  __builtin_prefetch(p);
  if constexpr (sizeof(Type) == 4) __builtin_prefetch(p + 16);
}

// Scores of sixteen keys, which lie `offsets` bytes behind `keys`, into `out[head * kChunk]` for kHeads queries. These
// are `queries[pair][group][32]`.
template <CacheType kType, int kHeads>
inline void score_sixteen(const typename Element<kType>::Type* keys, const int64_t* offsets, int64_t width,
                          const float* queries, int64_t group, float* out) {
  using Type = typename Element<kType>::Type;
  float lanes[kHeads][16][16];
  for (int key = 0; key < 16; key += kLoneKeys) {
    Floats totals[kLoneKeys][kHeads];
    const Type* from[kLoneKeys];
    const Type* ahead[kLoneKeys];
#pragma GCC unroll 4
    for (int k = 0; k < kLoneKeys; ++k) {
      from[k] = shifted(keys, offsets[key + k]);
      ahead[k] = shifted(keys, offsets[key + k + kAhead]);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) totals[k][h] = zeros();
    }
    const float* query = queries;
    const auto meet = [&](int64_t column, int64_t count) {
      Floats numbers[kLoneKeys][2];
#pragma GCC unroll 4
      for (int k = 0; k < kLoneKeys; ++k) load_pair<kType>(from[k] + column, count, numbers[k]);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Floats q = load(query + h * kPair + 16 * half);
#pragma GCC unroll 4
          for (int k = 0; k < kLoneKeys; ++k) totals[k][h] = multiply_add(numbers[k][half], q, totals[k][h]);
        }
      }
      query += group * kPair;
    };
    int64_t column = 0;
    for (; column + kPair <= width; column += kPair) {
#pragma GCC unroll 4
      for (int k = 0; k < kLoneKeys; ++k) ask_for(ahead[k] + column);
      meet(column, kPair);
    }
    if (column < width) meet(column, width - column);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int k = 0; k < kLoneKeys; ++k) store(lanes[h][key + k], totals[k][h]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    Floats each[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) each[i] = load(lanes[h][i]);
    store(out + h * kChunk, sums(each));
  }
}

// out[head * stride] += weights[head * kChunk + key] * values of `count` keys, for kLonePairs pairs of columns, of
// which `width` numbers exist.
template <CacheType kType, int kHeads>
inline void mix_columns(const typename Element<kType>::Type* values, const int64_t* offsets, int64_t count,
                        int64_t width, const float* weights, float* out, int64_t stride) {
  using Type = typename Element<kType>::Type;
  Floats totals[kHeads][2 * kLonePairs];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * kLonePairs; ++n) totals[h][n] = load(out + h * stride + 16 * n);
  }
  const auto meet = [&](int64_t key, const auto& get) {
    const Type* from = shifted(values, offsets[key]);
    Floats numbers[kLonePairs][2];
#pragma GCC unroll 2
    for (int n = 0; n < kLonePairs; ++n) get(from + kPair * n, n, numbers[n]);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const Floats weight = broadcast(weights[h * kChunk + key]);
#pragma GCC unroll 4
      for (int n = 0; n < 2 * kLonePairs; ++n) {
        totals[h][n] = multiply_add(weight, numbers[n / 2][n % 2], totals[h][n]);
      }
    }
  };
  if (width >= kPair * kLonePairs) {
    for (int64_t key = 0; key < count; ++key) {
      const Type* ahead = shifted(values, offsets[key + kAhead]);
#pragma GCC unroll 2
      for (int n = 0; n < kLonePairs; ++n) ask_for(ahead + kPair * n);
      meet(key, [](const Type* p, int, Floats(&x)[2]) { load_pair<kType>(p, x); });
    }
  } else {
    for (int64_t key = 0; key < count; ++key) {
      meet(key, [width](const Type* p, int n, Floats(&x)[2]) { load_pair<kType>(p, width - kPair * n, x); });
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * kLonePairs; ++n) store(out + h * stride + 16 * n, totals[h][n]);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `body` with a constant for `heads`, from 1 to kLoneHeads.
template <int kHeads = kLoneHeads, typename Body>
inline void with_heads(int64_t heads, const Body& body) {
  if constexpr (kHeads > 1) {
    if (heads < kHeads) return with_heads<kHeads - 1>(heads, body);
  }
  body(Constant<kHeads>{});
}

// Weights of `count` keys from their scores in `row`; the highest score goes to `end[0]`, the sum to `end[1]`.
inline void weigh_chunk(float* row, int64_t count, float* end) {
  const int64_t whole = (count + 15) / 16 * 16;
  const int last = static_cast<int>(count - (whole - 16));
  store(row + whole - 16, keep_first(load(row + whole - 16), last, -__builtin_inff()));
  Floats most = broadcast(kLowest);
  for (int64_t key = 0; key < whole; key += 16) most = maximum(load(row + key), most);
  end[0] = largest(most);
  most = broadcast(end[0]);
  Floats total = zeros();
  for (int64_t key = 0; key < whole; key += 16) {
    const Floats weight = exp2(subtract(load(row + key), most));
    total = add(total, weight);
    store(row + key, weight);
  }
  end[1] = sum(total);
}

// Queries of the heads that share a kv head: rotated, multiplied by what makes weights powers of two, and laid out as
// `score_sixteen` reads them. `rotated` is scratch for one.
template <CacheType kType>
inline void load_lone_queries(const Attention& a, int64_t row, int64_t kv_head, float* rotated, float* queries) {
  const int64_t width = a.head_dim, half = width / 2, group = a.group();
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(width));
  for (int64_t h = 0; h < group; ++h) {
    const float* q = a.q + (row * a.heads + kv_head * group + h) * width;
    rotate(q, a.cos + row * half, a.sin + row * half, half, scale, rotated);
    for (int64_t column = 0; column < width; column += kPair) {
      Floats pair[2];
      load_pair<CacheType::kFloat32>(rotated + column, width - column, pair);
      if constexpr (kType == CacheType::kBfloat16) split_pairs(pair);
      float* to = queries + (column / kPair * group + h) * kPair;
      store(to, pair[0]);
      store(to + 16, pair[1]);
    }
  }
}

// Scales of a chunk's keys and values, one after the other as the positions are.
struct ChunkScales {
  float keys[kChunk];
  float values[kChunk];

  ChunkScales(const Attention& a, const CachedRows& cached, int64_t first, int64_t count) {
    int64_t rows[kChunk];
    const int64_t whole = (count + 15) / 16 * 16;
    cached.list(first, count, whole, 1, rows);
    for (int64_t i = 0; i < whole; ++i) {
      keys[i] = a.k_scales[rows[i]];
      values[i] = a.v_scales[rows[i]];
    }
  }
};

inline void multiply_by(const float* scales, int64_t count, float* row) {
  for (int64_t i = 0; i < count; i += 16) store(row + i, multiply(load(row + i), load(scales + i)));
}

template <CacheType kType>
void lone_attention_as(const Attention& a, const KeyChunk& chunk, float* scratch) {
  using Type = typename Element<kType>::Type;
  const int64_t width = a.head_dim, group = a.group(), stride = lone_stride(a), count = chunk.last - chunk.first;
  float* rotated = scratch;
  float* queries = rotated + stride;
  float* weights = queries + group * stride;
  load_lone_queries<kType>(a, chunk.row, chunk.kv_head, rotated, queries);
  const Type* keys = static_cast<const Type*>(a.k_pages);
  const Type* values = static_cast<const Type*>(a.v_pages);
  const CachedRows cached(a, chunk.row, chunk.kv_head);
  // Asking past the chunk's end asks for its last row again.
  int64_t offsets[kChunk + kAhead];
  cached.list(chunk.first, count, (count + 15) / 16 * 16 + kAhead, width * static_cast<int64_t>(sizeof(Type)), offsets);
  // Calls `body` for as many heads at once as there are registers for.
  const auto for_heads = [&](const auto& body) {
    for (int64_t head = 0; head < group; head += kLoneHeads) {
      with_heads(group - head, [&](auto heads) { body(heads, head); });
    }
  };
  for (int64_t key = 0; key < count; key += 16) {
    for_heads([&](auto heads, int64_t head) {
      score_sixteen<kType, heads.value>(keys, offsets + key, width, queries + head * kPair, group,
                                        weights + head * kChunk + key);
    });
  }
  // The first values come while the weights are made.
  for (int64_t i = 0; i < kAhead && i < count; ++i) {
    for (int64_t column = 0; column < width; column += kPair) ask_for(shifted(values, offsets[i]) + column);
  }
  float* totals = chunk.partial;
  float* ends = totals + group * stride;
  if constexpr (kType == CacheType::kInt8) {
    const ChunkScales scales(a, cached, chunk.first, count);
    for (int64_t h = 0; h < group; ++h) {
      float* row = weights + h * kChunk;
      multiply_by(scales.keys, count, row);
      weigh_chunk(row, count, ends + 16 * h);
      multiply_by(scales.values, count, row);
    }
  } else {
    for (int64_t h = 0; h < group; ++h) weigh_chunk(weights + h * kChunk, count, ends + 16 * h);
  }
  for (int64_t i = 0; i < group * stride; i += 16) store(totals + i, zeros());
  // So few keys at once that their later columns are met in the first-level cache.
  constexpr int64_t kKeys = 32;
  for (int64_t key = 0; key < count; key += kKeys) {
    const int64_t here = count - key < kKeys ? count - key : kKeys;
    for_heads([&](auto heads, int64_t head) {
      for (int64_t column = 0; column < width; column += kPair * kLonePairs) {
        mix_columns<kType, heads.value>(values + column, offsets + key, here, width - column,
                                        weights + head * kChunk + key, totals + head * stride + column, stride);
      }
    });
  }
}

// The only query of a row over one chunk of what it sees; all heads that share the kv head.
void lone_attention(const Attention& a, const KeyChunk& chunk, float* scratch) {
  switch (a.type) {
    case CacheType::kBfloat16: return lone_attention_as<CacheType::kBfloat16>(a, chunk, scratch);
    case CacheType::kFloat16: return lone_attention_as<CacheType::kFloat16>(a, chunk, scratch);
    case CacheType::kFloat32: return lone_attention_as<CacheType::kFloat32>(a, chunk, scratch);
    case CacheType::kInt8: return lone_attention_as<CacheType::kInt8>(a, chunk, scratch);
    case CacheType::kE4m3: return lone_attention_as<CacheType::kE4m3>(a, chunk, scratch);
  }
}

// The result of one row and kv head from its chunks' partials, which lie one after the other.
void merge_chunks(const Attention& a, int64_t row, int64_t kv_head, float* partials, int64_t count) {
  const int64_t width = a.head_dim, group = a.group(), stride = lone_stride(a), floats = lone_partial_floats(a);
  for (int64_t h = 0; h < group; ++h) {
    float* to = a.mixed + (row * a.heads + kv_head * group + h) * width;
    float* ends = partials + group * stride + 16 * h;
    float most = kLowest, total = 0.0f;
    for (int64_t i = 0; i < count; ++i) most = ends[i * floats] > most ? ends[i * floats] : most;
    for (int64_t i = 0; i < count; ++i) {
      // The highest score becomes the chunk's factor, and what stood behind it is of no more use.
      float* end = ends + i * floats;
      const float sum_of_weights = end[1];
      store(end, exp2(broadcast(end[0] - most)));
      total += end[0] * sum_of_weights;
    }
    const Floats divisor = broadcast(1.0f / total);
    for (int64_t column = 0; column < width; column += kPair) {
      Floats mixed[2] = {zeros(), zeros()};
      for (int64_t i = 0; i < count; ++i) {
        const float* from = partials + i * floats + h * stride + column;
        const Floats factor = broadcast(ends[i * floats]);
        mixed[0] = multiply_add(load(from), factor, mixed[0]);
        mixed[1] = multiply_add(load(from + 16), factor, mixed[1]);
      }
      if (a.type == CacheType::kBfloat16) join_pairs(mixed);
      for (int half = 0; half < 2; ++half) {
        const int64_t left = width - column - 16 * half;
        const Floats result = multiply(mixed[half], divisor);
        if (left >= 16) {
          store(to + column + 16 * half, result);
        } else if (left > 0) {
          store_first(to + column + 16 * half, result, static_cast<int>(left));
        }
      }
    }
  }
}
