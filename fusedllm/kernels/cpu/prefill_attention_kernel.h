// Attention of many queries: keys and values are met in blocks, converted once for all queries and heads of an item.
// Included by all_kernels.h.
//
// Scores of a block are one small matrix product, their weights' sum of values another, with the softmax's highest
// score and sum of weights carried along (arXiv:1805.02867, arXiv:2205.14135). Rows of these products are the queries'
// heads that share a kv head, query after query. Where blocks begin depends on the position alone, and a row's sums run over
// the keys in their order, so that no row's result depends on how the work was cut.

// Keys of a block: with the values beside them they stay in a core's second-level cache, in tiles of the first.
constexpr int kBlockKeys = 128;

// Below any score, and a number still: infinity less infinity would be none.
constexpr float kLowest = -1e30f;

// Where the arrays lie that an item works on, in floats from the start of its scratch.
struct PrefillScratch {
  int64_t rows;
  int64_t tiles;
  int64_t stride;  // of a row of values
  float* queries;  // [tiles][head_dim][kTileRows]
  float* keys;     // [head_dim up to whole vectors][kBlockKeys]
  float* values;   // [kBlockKeys][stride]
  float* weights;  // [kTileRows][kBlockKeys]
  float* totals;   // [tiles * kTileRows][stride]
  float* highest;  // [tiles][16], as are the sums of weights
  float* sums;
  float* scales;  // [2][kBlockKeys], of keys and of values
  int64_t floats;  // in all

  // Without memory only counted.
  PrefillScratch(const Attention& a, int64_t queries_count, float* memory) {
    rows = queries_count * a.group();
    tiles = (rows + kTileRows - 1) / kTileRows;
    stride = whole_vectors(a.head_dim, kTileVectors);
    floats = 0;
    const auto take = [&](int64_t count) {
      float* taken = memory == nullptr ? nullptr : memory + floats;
      floats += (count + 15) / 16 * 16;
      return taken;
    };
    queries = take(tiles * a.head_dim * kTileRows);
    keys = take(whole_vectors(a.head_dim, 1) * kBlockKeys);
    values = take(kBlockKeys * stride);
    weights = take(kTileRows * kBlockKeys);
    totals = take(tiles * kTileRows * stride);
    highest = take(tiles * 16);
    sums = take(tiles * 16);
    scales = take(2 * kBlockKeys);
  }
};

int64_t prefill_floats(const Attention& a, int64_t queries) { return PrefillScratch(a, queries, nullptr).floats; }

// sums[r][n] += a[r * kRowStep + k * kDepthStep] * b[k * b_stride + 16 n] over k below `depth`.
template <int kRows, int kRowStep, int kDepthStep>
inline void multiply_tile(const float* a, const float* b, int64_t b_stride, int64_t depth,
                          Floats (&sums)[kRows][kTileVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[kTileVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kTileVectors; ++n) columns[n] = load(b + 16 * n);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats value = broadcast(a[r * kRowStep]);
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) sums[r][n] = multiply_add(value, columns[n], sums[r][n]);
    }
    a += kDepthStep;
    b += b_stride;
  }
}

// One tile of rows, and one block of keys: which of its keys the rows see.
struct Tile {
  const Attention* attention;
  const PrefillScratch* scratch;
  int64_t index;
  int64_t first_position;  // of the item's first query
  int64_t block;           // position of the block's first key

  int64_t position(int row) const {
    return first_position + (index * kTileRows + row) / attention->group();
  }
  // In the block, from 0 to kBlockKeys.
  int first_key(int row) const { return inside(attention->first_visible(position(row))); }
  int end_key(int row) const { return inside(attention->end_visible(position(row))); }

 private:
  int inside(int64_t key) const {
    return static_cast<int>(key < block ? 0 : (key - block > kBlockKeys ? kBlockKeys : key - block));
  }
};

// Weights of the block's keys for each row of the tile, in `scratch.weights`; `rescale` is what sums so far lose.
template <int kRows>
void weigh(const Tile& tile, int first_key, int end_key, bool scaled, float* rescale) {
  constexpr int kWidth = 16 * kTileVectors;
  const PrefillScratch& scratch = *tile.scratch;
  const int64_t depth = tile.attention->head_dim;
  const float* queries = scratch.queries + tile.index * depth * kTileRows;
  const int first = first_key / kWidth * kWidth, end = (end_key + kWidth - 1) / kWidth * kWidth;
  // Rows see more the later they are.
  const bool masked = tile.first_key(kRows - 1) > first || tile.end_key(0) < end;
  for (int key = first; key < end; key += kWidth) {
    Floats scores[kRows][kTileVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) scores[r][n] = zeros();
    }
    multiply_tile<kRows, 1, kTileRows>(queries, scratch.keys + key, kBlockKeys, depth, scores);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) store(scratch.weights + r * kBlockKeys + key + 16 * n, scores[r][n]);
    }
  }
  float* highest = scratch.highest + 16 * tile.index;
  const Floats before = load(highest);
  for (int r = 0; r < kRows; ++r) {
    float* row = scratch.weights + r * kBlockKeys;
    if (scaled) {
      for (int key = first; key < end; key += 16) {
        store(row + key, multiply(load(row + key), load(scratch.scales + key)));
      }
    }
    if (masked) {
      const int row_first = tile.first_key(r), row_end = tile.end_key(r);
      const auto lanes = [](int count) { return count < 0 ? 0 : (count > 16 ? 16 : count); };
      for (int key = first; key < end; key += 16) {
        const Floats seen = keep_first(load(row + key), lanes(row_end - key), -__builtin_inff());
        store(row + key, keep_from(seen, lanes(row_first - key), -__builtin_inff()));
      }
    }
    Floats most = broadcast(highest[r]);
    for (int key = first; key < end; key += 16) most = maximum(load(row + key), most);
    highest[r] = largest(most);
  }
  store(rescale, exp2(subtract(before, load(highest))));
  for (int r = 0; r < kRows; ++r) {
    float* row = scratch.weights + r * kBlockKeys;
    const Floats most = broadcast(highest[r]);
    Floats total = zeros();
    for (int key = first; key < end; key += 16) {
      const Floats weight = exp2(subtract(load(row + key), most));
      total = add(total, weight);
      store(row + key, scaled ? multiply(weight, load(scratch.scales + kBlockKeys + key)) : weight);
    }
    float& sum_so_far = scratch.sums[16 * tile.index + r];
    sum_so_far = sum_so_far * rescale[r] + sum(total);
  }
}

template <int kRows>
void visit_tile(const Tile& tile, bool scaled) {
  const int first_key = tile.first_key(0), end_key = tile.end_key(kRows - 1);
  if (first_key >= end_key) return;
  float rescale[16];
  weigh<kRows>(tile, first_key, end_key, scaled, rescale);
  const PrefillScratch& scratch = *tile.scratch;
  float* totals = scratch.totals + tile.index * kTileRows * scratch.stride;
  for (int64_t column = 0; column < scratch.stride; column += 16 * kTileVectors) {
    Floats sums[kRows][kTileVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) {
        sums[r][n] = multiply(load(totals + r * scratch.stride + column + 16 * n), broadcast(rescale[r]));
      }
    }
    const float* values = scratch.values + first_key * scratch.stride + column;
    multiply_tile<kRows, kBlockKeys, 1>(scratch.weights + first_key, values, scratch.stride, end_key - first_key, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kTileVectors; ++n) store(totals + r * scratch.stride + column + 16 * n, sums[r][n]);
    }
  }
}

// The function of a tile of `rows` rows; a table of all, as each number of rows is a function of its own.
using VisitTile = void (*)(const Tile&, bool);
template <int kRows>
inline VisitTile visit_for(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return visit_for<kRows - 1>(rows);
  }
  return visit_tile<kRows>;
}

// Keys as columns and values as rows, floats both, of `count` positions from `block` on. Columns before the `seen`th, on
// whose pages nothing is known, repeat that one, and columns past the count the last; their scores are masked.
template <CacheType kType>
void load_block(const Attention& a, const CachedRows& cached, int64_t block, int seen, int count,
                const PrefillScratch& scratch) {
  using Type = typename Element<kType>::Type;
  const int64_t width = a.head_dim;
  int64_t numbers[kBlockKeys];
  const int padded = (count + 15) / 16 * 16;
  cached.list(block + seen, count - seen, padded - seen, 1, numbers + seen);
  for (int key = 0; key < seen; ++key) numbers[key] = numbers[seen];
  const Type* keys = static_cast<const Type*>(a.k_pages);
  const Type* values = static_cast<const Type*>(a.v_pages);
  for (int key = 0; key < padded; key += 16) {
    for (int64_t column = 0; column < width; column += 16) {
      const Type* from = keys + column;
      Floats square[16];
      if (width - column >= 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) square[i] = load_cached<kType>(from + numbers[key + i] * width);
      } else {
        const int rest = static_cast<int>(width - column);
        for (int i = 0; i < 16; ++i) square[i] = load_cached_first<kType>(from + numbers[key + i] * width, rest);
      }
      transpose(square);
      float* to = scratch.keys + column * kBlockKeys + key;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(to + i * kBlockKeys, square[i]);
    }
  }
  for (int key = 0; key < count; ++key) {
    const Type* from = values + numbers[key] * width;
    float* to = scratch.values + key * scratch.stride;
    int64_t column = 0;
    for (; column + 16 <= width; column += 16) store(to + column, load_cached<kType>(from + column));
    if (column < width) store(to + column, load_cached_first<kType>(from + column, static_cast<int>(width - column)));
  }
  if constexpr (kType == CacheType::kInt8) {
    for (int key = 0; key < padded; ++key) {
      scratch.scales[key] = a.k_scales[numbers[key]];
      scratch.scales[kBlockKeys + key] = a.v_scales[numbers[key]];
    }
  }
}

// The queries rotated, and multiplied by what makes weights powers of two.
inline void load_queries(const Attention& a, const QueryBlock& item, const PrefillScratch& scratch) {
  const int64_t width = a.head_dim, half = width / 2, group = a.group();
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(width));
  const int64_t padded = whole_vectors(width, 1);
  // Rotated where keys will be, and laid from there into columns.
  float* rotated = scratch.keys;
  for (int64_t tile = 0; tile < scratch.tiles; ++tile) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t row = tile * kTileRows + i;
      // Rows past the last one repeat it, and are not stored.
      const int64_t here = row < scratch.rows ? row : scratch.rows - 1;
      const int64_t token = item.row * a.seq + item.first + here / group;
      const float* q = a.q + (token * a.heads + item.kv_head * group + here % group) * width;
      rotate(q, a.cos + token * half, a.sin + token * half, half, scale, rotated + i * padded);
    }
    float* to = scratch.queries + tile * width * kTileRows;
    for (int64_t column = 0; column < width; column += 16) {
      Floats square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) square[i] = i < kTileRows ? load(rotated + i * padded + column) : zeros();
      transpose(square);
      const int rest = width - column < 16 ? static_cast<int>(width - column) : 16;
      for (int i = 0; i < rest; ++i) store_first(to + (column + i) * kTileRows, square[i], kTileRows);
    }
  }
}

inline void store_mixed(const Attention& a, const QueryBlock& item, const PrefillScratch& scratch) {
  const int64_t width = a.head_dim, group = a.group();
  for (int64_t row = 0; row < scratch.rows; ++row) {
    const int64_t token = item.row * a.seq + item.first + row / group;
    float* to = a.mixed + (token * a.heads + item.kv_head * group + row % group) * width;
    const float* from = scratch.totals + row * scratch.stride;
    const int64_t position = a.start[item.row] + item.first + row / group;
    // Past the table's end a window may show nothing; such a query belongs to nobody.
    const bool sees = a.first_visible(position) < a.end_visible(position);
    const float sum_of_weights = scratch.sums[row / kTileRows * 16 + row % kTileRows];
    const Floats factor = broadcast(sees ? 1.0f / sum_of_weights : 0.0f);
    int64_t column = 0;
    for (; column + 16 <= width; column += 16) store(to + column, multiply(load(from + column), factor));
    if (column < width) {
      store_first(to + column, multiply(load(from + column), factor), static_cast<int>(width - column));
    }
  }
}

template <CacheType kType>
void prefill_attention_as(const Attention& a, const QueryBlock& item, float* memory) {
  const PrefillScratch scratch(a, item.last - item.first, memory);
  load_queries(a, item, scratch);
  // Columns of values past the head's width are multiplied too, and not read.
  for (int64_t i = 0; i < kBlockKeys * scratch.stride; ++i) scratch.values[i] = 0.0f;
  for (int64_t i = 0; i < scratch.tiles * kTileRows * scratch.stride; ++i) scratch.totals[i] = 0.0f;
  for (int64_t i = 0; i < scratch.tiles * 16; ++i) {
    scratch.highest[i] = kLowest;
    scratch.sums[i] = 0.0f;
  }
  const int64_t position = a.start[item.row] + item.first;
  const int64_t end = a.end_visible(a.start[item.row] + item.last - 1);
  const CachedRows cached(a, item.row, item.kv_head);
  const int64_t visible = a.first_visible(position);
  for (int64_t block = visible / kBlockKeys * kBlockKeys; block < end; block += kBlockKeys) {
    const int count = static_cast<int>(end - block < kBlockKeys ? end - block : kBlockKeys);
    load_block<kType>(a, cached, block, visible > block ? static_cast<int>(visible - block) : 0, count, scratch);
    for (int64_t tile = 0; tile < scratch.tiles; ++tile) {
      const int64_t rows = scratch.rows - tile * kTileRows;
      visit_for<kTileRows>(rows)(Tile{&a, &scratch, tile, position, block}, kType == CacheType::kInt8);
    }
  }
  store_mixed(a, item, scratch);
}

void prefill_attention(const Attention& a, const QueryBlock& item, float* scratch) {
  switch (a.type) {
    case CacheType::kBfloat16: return prefill_attention_as<CacheType::kBfloat16>(a, item, scratch);
    case CacheType::kFloat16: return prefill_attention_as<CacheType::kFloat16>(a, item, scratch);
    case CacheType::kFloat32: return prefill_attention_as<CacheType::kFloat32>(a, item, scratch);
    case CacheType::kInt8: return prefill_attention_as<CacheType::kInt8>(a, item, scratch);
    case CacheType::kE4m3: return prefill_attention_as<CacheType::kE4m3>(a, item, scratch);
  }
}
