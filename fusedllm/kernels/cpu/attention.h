// What the kernels of attention read and write: one layer's keys and values in pages, and the new positions' rows.
#pragma once

#include <cstdint>

// Of what several variants use: a copy that was compiled for one of them must not serve the others.
#define FUSEDLLM_INLINE __attribute__((always_inline)) inline

namespace fusedllm {

// Writes of padding and of finished requests name this page; nobody reads it, so they are left out.
constexpr int32_t kNullPage = 0;

// How the cache keeps a number. Of int8 there is a scale for each position and head: value = scale * code. E4m3 is the
// 8-bit floating point number of arXiv:2209.05433: a sign, four bits of exponent, three of fraction, no infinity.
enum class CacheType : int32_t { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3, kE4m3 = 4 };

// Arrays lie as their axes say, the last one contiguous.
struct Attention {
  const float* q;             // [batch, seq, heads, head_dim], before rotation, as are the new keys
  const float* k;             // [batch, seq, kv_heads, head_dim]
  const float* v;             // [batch, seq, kv_heads, head_dim]
  const float* cos;           // [batch, seq, head_dim / 2]
  const float* sin;           // [batch, seq, head_dim / 2]
  const int32_t* page_table;  // [batch, table]
  const int32_t* start;       // [batch], the position of each row's first query
  void* k_pages;              // [pages, kv_heads, page_size, head_dim]
  void* v_pages;
  float* k_scales;  // [pages, kv_heads, page_size], of int8 only
  float* v_scales;
  float* mixed;  // [batch, seq, heads, head_dim]
  CacheType type;
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t page_size;
  int64_t table;
  int64_t window;  // how many positions a query sees at most, its own included

  FUSEDLLM_INLINE int64_t group() const { return heads / kv_heads; }
  // Positions from here on have no page.
  FUSEDLLM_INLINE int64_t limit() const { return table * page_size; }
  // What the query at `position` sees: from the first of these to before the second.
  FUSEDLLM_INLINE int64_t first_visible(int64_t position) const {
    return position < window ? 0 : position - window + 1;
  }
  FUSEDLLM_INLINE int64_t end_visible(int64_t position) const { return position < limit() ? position + 1 : limit(); }
};

// A query alone in its row meets the cache in chunks of so many positions, each of which gives its own softmax. Where
// they begin depends on nothing but the position, so that a row's result does not depend on its company.
constexpr int64_t kChunk = 256;

// The queries [first, last) of a row, with all heads that share the kv head.
struct QueryBlock {
  int64_t row;
  int64_t kv_head;
  int64_t first;
  int64_t last;
};

// Positions [first, last) of a chunk, for the only query of a row and the heads that share a kv head. `partial` takes
// the heads' sums of weighted values, highest scores and sums of weights.
struct KeyChunk {
  int64_t row;
  int64_t kv_head;
  int64_t first;
  int64_t last;
  float* partial;
};

}  // namespace fusedllm
