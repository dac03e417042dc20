// `fusedllm_attention`: rotates new queries and keys, writes keys and values into the cache, and attends over it.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "ffi_support.h"
#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

// Loops are cut into this many parts for each thread, so that a thread that is interrupted holds up nobody.
constexpr int64_t kPartsPerThread = 4;
// The caller works alone on new keys of up to so many elements, and on so many bytes of cache for lone queries: both
// take less than a worker needs to notice.
constexpr int64_t kFewElements = 8192;
constexpr int64_t kFewBytes = 48 * 1024;
// Of an item's queries: so many that converting keys and values is a small part of the work, so few that they and their
// sums stay in a core's second-level cache. A multiple of every variant's rows of a tile.
constexpr int64_t kTileQueries = 12;
constexpr int64_t kMostRows = 192;
constexpr int64_t kMostRowFloats = 24576;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(CacheType type) {
  switch (type) {
    case CacheType::kFloat32: return 4;
    case CacheType::kBfloat16:
    case CacheType::kFloat16: return 2;
    case CacheType::kInt8:
    case CacheType::kE4m3: break;
  }
  return 1;
}

void write(const Attention& a) {
  const Kernels& kernels = fusedllm::kernels();
  const int64_t tokens = a.batch * a.seq;
  const auto part = [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    kernels.write_cache(a, first, last, scratch.of<float>(a.head_dim + 16));
  };
  if (tokens * a.kv_heads * a.head_dim <= kFewElements) return part(0, tokens);
  const int64_t size = ceil_divide(tokens, kPartsPerThread * Pool::instance().threads());
  Pool::instance().run(ceil_divide(tokens, size), [&](int64_t i) {
    part(i * size, std::min(tokens, (i + 1) * size));
  });
}

int64_t queries_of_an_item(const Attention& a) {
  const int64_t rows = std::min(kMostRows, kMostRowFloats / a.head_dim);
  const int64_t most = std::max<int64_t>(1, rows / a.group() / kTileQueries) * kTileQueries;
  const int64_t others = a.batch * a.kv_heads;
  const int64_t wanted = ceil_divide(kPartsPerThread * Pool::instance().threads(), others);
  const int64_t fair = ceil_divide(ceil_divide(a.seq, wanted), kTileQueries) * kTileQueries;
  return std::min(most, fair);
}

void prefill(const Attention& a) {
  const Kernels& kernels = fusedllm::kernels();
  const int64_t queries = queries_of_an_item(a), blocks = ceil_divide(a.seq, queries);
  const int64_t others = a.batch * a.kv_heads;
  Pool::instance().run(blocks * others, [&](int64_t i) {
    static thread_local Scratch scratch;
    // Later queries see more: theirs go first, so that no thread is left with a long one at the end.
    const int64_t block = blocks - 1 - i / others, other = i % others;
    const QueryBlock item{other / a.kv_heads, other % a.kv_heads, block * queries,
                          std::min(a.seq, (block + 1) * queries)};
    kernels.prefill_attention(a, item, scratch.of<float>(kernels.prefill_floats(a, queries)));
  });
}

// One query in each row: a unit of work is one chunk of keys of one row and kv head.
class Lone {
 public:
  explicit Lone(const Attention& a) : a_(a), kernels_(fusedllm::kernels()) {}

  void run() {
    static thread_local std::vector<int64_t> first_units;
    first_units.resize(static_cast<size_t>(a_.batch) + 1);
    first_units_ = first_units.data();
    int64_t units = 0, positions = 0;
    for (int64_t row = 0; row < a_.batch; ++row) {
      first_units_[row] = units;
      units += chunks(row) * a_.kv_heads;
      positions += end(row) - first(row);
    }
    first_units_[a_.batch] = units;
    static thread_local Scratch scratch;
    partial_floats_ = kernels_.lone_partial_floats(a_);
    partials_ = scratch.of<float>(units * partial_floats_);
    const bool few = positions * a_.kv_heads * a_.head_dim * 2 * element_bytes(a_.type) <= kFewBytes;
    const int64_t parts = few ? 1 : std::min(units, kPartsPerThread * Pool::instance().threads());
    Pool::instance().run(parts, [&](int64_t i) { work(units * i / parts, units * (i + 1) / parts); });
    const int64_t results = a_.batch * a_.kv_heads, merges = few ? 1 : std::min(results, parts);
    Pool::instance().run(merges, [&](int64_t i) {
      for (int64_t j = results * i / merges; j < results * (i + 1) / merges; ++j) {
        merge(j / a_.kv_heads, j % a_.kv_heads);
      }
    });
  }

 private:
  int64_t first(int64_t row) const { return a_.first_visible(a_.start[row]); }
  int64_t end(int64_t row) const { return std::max(first(row), a_.end_visible(a_.start[row])); }
  int64_t chunks(int64_t row) const {
    return first(row) == end(row) ? 0 : ceil_divide(end(row), kChunk) - first(row) / kChunk;
  }

  void work(int64_t from, int64_t to) const {
    static thread_local Scratch scratch;
    float* memory = scratch.of<float>(kernels_.lone_scratch_floats(a_));
    int64_t row = std::upper_bound(first_units_, first_units_ + a_.batch + 1, from) - first_units_ - 1;
    for (int64_t unit = from; unit < to; ++unit) {
      while (unit >= first_units_[row + 1]) ++row;
      const int64_t in_row = unit - first_units_[row], count = chunks(row);
      const int64_t chunk = (first(row) / kChunk + in_row % count) * kChunk;
      const KeyChunk item{row, in_row / count, std::max(first(row), chunk), std::min(end(row), chunk + kChunk),
                          partials_ + unit * partial_floats_};
      kernels_.lone_attention(a_, item, memory);
    }
  }

  void merge(int64_t row, int64_t head) const {
    const int64_t count = chunks(row);
    if (count == 0) {
      // Past the table's end a window may show nothing; such a query belongs to nobody.
      const int64_t floats = a_.group() * a_.head_dim;
      std::fill_n(a_.mixed + (row * a_.kv_heads + head) * floats, floats, 0.0f);
      return;
    }
    kernels_.merge_chunks(a_, row, head, partials_ + (first_units_[row] + head * count) * partial_floats_, count);
  }

  const Attention& a_;
  const Kernels& kernels_;
  int64_t* first_units_ = nullptr;
  int64_t partial_floats_ = 0;
  float* partials_ = nullptr;
};

template <typename... Sizes>
bool has_shape(const ffi::AnyBuffer& buffer, Sizes... sizes) {
  const int64_t wanted[] = {sizes...};
  const auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), std::begin(wanted), std::end(wanted));
}

bool is_aligned(const ffi::AnyBuffer& buffer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % static_cast<uintptr_t>(bytes) == 0;
}


// Fills the fields that the shapes of the new positions give.
ffi::Error take_positions(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                          ffi::AnyBuffer page_table, ffi::AnyBuffer start, ffi::AnyBuffer mixed, Attention& a) {
  for (const ffi::AnyBuffer& buffer : {q, k, v, cos, sin, mixed}) {
    if (buffer.element_type() != ffi::F32 || !is_aligned(buffer, 4)) {
      return refuse("attention: q, k, v, cos, sin and the result must be float32, aligned as such.");
    }
  }
  for (const ffi::AnyBuffer& buffer : {page_table, start}) {
    if (buffer.element_type() != ffi::S32 || !is_aligned(buffer, 4)) {
      return refuse("attention: page_table and start must be int32, aligned as such.");
    }
  }
  if (q.dimensions().size() != 4 || k.dimensions().size() != 4 || page_table.dimensions().size() != 2) {
    return refuse("attention: q and k have four axes, page_table two.");
  }
  a.batch = q.dimensions()[0];
  a.seq = q.dimensions()[1];
  a.heads = q.dimensions()[2];
  a.head_dim = q.dimensions()[3];
  a.kv_heads = k.dimensions()[2];
  a.table = page_table.dimensions()[1];
  if (a.head_dim <= 0 || a.head_dim % 2 != 0) {
    return refuse("attention: head_dim must be even, as it is rotated in pairs.");
  }
  if (a.kv_heads <= 0 || a.heads <= 0 || a.heads % a.kv_heads != 0) {
    return refuse("attention: heads must be a multiple of kv_heads.");
  }
  if (!has_shape(k, a.batch, a.seq, a.kv_heads, a.head_dim) || !has_shape(v, a.batch, a.seq, a.kv_heads, a.head_dim)) {
    return refuse("attention: k and v must be [batch, seq, kv_heads, head_dim] of the batch, seq and head_dim of q.");
  }
  if (!has_shape(cos, a.batch, a.seq, a.head_dim / 2) || !has_shape(sin, a.batch, a.seq, a.head_dim / 2)) {
    return refuse("attention: cos and sin must be [batch, seq, head_dim / 2].");
  }
  if (!has_shape(page_table, a.batch, a.table) || !has_shape(start, a.batch)) {
    return refuse("attention: page_table and start must have a row for each of q's batch.");
  }
  if (!has_shape(mixed, a.batch, a.seq, a.heads, a.head_dim)) {
    return refuse("attention: the result must have q's shape.");
  }
  a.q = q.typed_data<float>();
  a.k = k.typed_data<float>();
  a.v = v.typed_data<float>();
  a.cos = cos.typed_data<float>();
  a.sin = sin.typed_data<float>();
  a.page_table = page_table.typed_data<int32_t>();
  a.start = start.typed_data<int32_t>();
  a.mixed = mixed.typed_data<float>();
  return ffi::Error::Success();
}

// Fills the fields that the cache gives; `pages` is how many there are.
ffi::Error take_pages(ffi::RemainingArgs arguments, ffi::RemainingRets results, Attention& a, int64_t& pages) {
  const size_t count = arguments.size();
  if (results.size() != count || (count != 2 && count != 4)) {
    return refuse("attention: the cache is two arrays, or four with int8's scales, and as many results.");
  }
  void* data[4] = {};
  for (size_t i = 0; i < count; ++i) {
    const auto argument = arguments.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (argument.has_error() || result.has_error()) return refuse("attention: the cache can't be read.");
    const ffi::AnyBuffer buffer = *argument;
    data[i] = buffer.untyped_data();
    if ((*result)->untyped_data() != data[i]) {
      return refuse("attention: the cache must be updated in place, its results aliasing its arguments.");
    }
    if (i == 0) {
      switch (buffer.element_type()) {
        case ffi::BF16: a.type = CacheType::kBfloat16; break;
        case ffi::F16: a.type = CacheType::kFloat16; break;
        case ffi::F32: a.type = CacheType::kFloat32; break;
        case ffi::S8: a.type = CacheType::kInt8; break;
        case ffi::U8: a.type = CacheType::kE4m3; break;
        default: return refuse("attention: the cache must be bfloat16, float16, float32, int8, or uint8 for e4m3.");
      }
      if ((a.type == CacheType::kInt8) != (count == 4)) {
        return refuse("attention: a cache of int8, and no other, has scales.");
      }
      if (buffer.dimensions().size() != 4) return refuse("attention: pages have four axes.");
      pages = buffer.dimensions()[0];
      a.page_size = buffer.dimensions()[2];
      if (pages <= 0 || a.page_size <= 0) return refuse("attention: the cache must have pages, and pages positions.");
    }
    if (i < 2) {
      const bool same = buffer.element_type() == arguments.get<ffi::AnyBuffer>(0)->element_type();
      if (!same || !has_shape(buffer, pages, a.kv_heads, a.page_size, a.head_dim)) {
        return refuse("attention: K and V must be [pages, kv_heads, page_size, head_dim] of one dtype.");
      }
      if (!is_aligned(buffer, element_bytes(a.type))) {
        return refuse("attention: the cache is not aligned as its dtype.");
      }
    } else if (buffer.element_type() != ffi::F32 || !has_shape(buffer, pages, a.kv_heads, a.page_size) ||
               !is_aligned(buffer, 4)) {
      return refuse("attention: scales must be float32 [pages, kv_heads, page_size].");
    }
  }
  a.k_pages = data[0];
  a.v_pages = data[1];
  a.k_scales = static_cast<float*>(data[2]);
  a.v_scales = static_cast<float*>(data[3]);
  return ffi::Error::Success();
}

// What shapes don't say: that positions and page numbers exist.
ffi::Error check_values(const Attention& a, int64_t pages) {
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t start = a.start[row];
    if (start < 0) {
      return refuse("attention: row " + std::to_string(row) + " starts at position " + std::to_string(start) +
                    "; positions begin at 0.");
    }
    const int64_t end = std::min(a.table, ceil_divide(start + a.seq, a.page_size));
    for (int64_t i = std::min(end, a.first_visible(start) / a.page_size); i < end; ++i) {
      const int32_t page = a.page_table[row * a.table + i];
      if (page < 0 || page >= pages) {
        return refuse("attention: row " + std::to_string(row) + " of the page table names page " +
                      std::to_string(page) + "; the cache has " + std::to_string(pages) + " pages.");
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error attention(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                     ffi::AnyBuffer page_table, ffi::AnyBuffer start, ffi::RemainingArgs cache,
                     ffi::Result<ffi::AnyBuffer> mixed, ffi::RemainingRets updated, int64_t window) try {
  Attention a{};
  int64_t pages = 0;
  if (ffi::Error error = take_positions(q, k, v, cos, sin, page_table, start, *mixed, a); error.failure()) return error;
  if (ffi::Error error = take_pages(cache, updated, a, pages); error.failure()) return error;
  if (window < 0) return refuse("attention: a window is positive, or 0 where there is none.");
  a.window = window == 0 ? INT64_MAX : window;
  if (ffi::Error error = check_values(a, pages); error.failure()) return error;
  if (a.batch == 0 || a.seq == 0) return ffi::Error::Success();
  write(a);
  if (a.seq == 1) {
    Lone(a).run();
  } else {
    prefill(a);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fusedllm: attention: no memory for the scores.");
}

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_attention, fusedllm::attention,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("window"));
