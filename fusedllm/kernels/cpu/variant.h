// What each compiled variant of the kernels offers: one table of functions, and the structures that they read.
//
// A variant is one file, `variant_NAME.cc`, compiled with the flags of its instruction set; it includes `simd_NAME.h`
// and then every operation (`*_kernel.h`) inside a namespace of its own. Those files use nothing of the standard library
// but plain C: an inline function of it that was compiled with AVX-512 could be the copy that the linker keeps for
// everybody, and would then stop a processor without it.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fusedllm {

// More columns of int8 codes would overflow a sum of int32.
constexpr int64_t kMostIntegerColumns = 65536;

// Weights are packed in panels of this many rows, and activations quantized in groups of this many elements.
constexpr int kPanelRows = 16;
constexpr int kGroup = 32;

// How the weights of a matrix lie in memory. Those before kBfloat16 are packed panels (`packing.h`), others plain rows.
enum class Format : int32_t {
  kQ4 = 0,       // 4 bits, value = scale * (code - 8)
  kQ4Min = 1,    // 4 bits, value = scale * code + minimum
  kQ5 = 2,       // 5 bits, value = scale * (code - 16)
  kQ5Min = 3,    // 5 bits, value = scale * code + minimum
  kQ8 = 4,       // 8 bits, value = scale * (code - 128)
  kQ4Zero = 5,   // 4 bits, value = scale * (code - zero)
  kInteger = 6,  // as kQ8 with one scale a row; its products are sums of integers
  kBfloat16 = 7,
  kFloat16 = 8,
  kFloat32 = 9,
};
constexpr int kFormats = 10;

inline bool is_packed(Format format) { return format < Format::kBfloat16; }

// Activations of `tokens` tokens, quantized to codes of one or two digits (levels) of eight bits, each from -127 to 127:
// first * 256 + second, or first alone. Tokens lie in blocks (the variant's `token_block` says of how many); in a block
// of n tokens group g holds `codes[levels][n][32]`, `scales[n]`, `sums[n]` and `corrections[n]`. With two levels a scale
// is a power of two. `sums` are the sums of the group's elements, as the codes have them, and `corrections` the sums of
// its codes times -8. A token's `start` is zero, or no number where one of its elements is infinite or none.
struct Activations {
  int8_t* codes;
  float* scales;
  float* sums;
  int32_t* corrections;
  float* starts;
  int64_t tokens;
  int64_t groups;
  int64_t levels;  // 1 or 2
};

// Activations for products that are sums of integers: codes from -127 to 127, one scale a token, in the same blocks. In
// a block of n tokens group g holds `codes[n][32]`; `corrections` are the sums of a token's codes times -128.
struct IntegerActivations {
  int8_t* codes;
  float* scales;         // [tokens]; no number where one of the token's elements is infinite or none
  int32_t* corrections;  // [tokens]
  int64_t tokens;
  int64_t groups;
};

// Plain activations in the same blocks, each element k of a block as `[k][n]`, or each pair of bfloat16 elements.
struct FloatActivations {
  float* values;
  int64_t tokens;
  int64_t width;
};

// One weight matrix and where its product goes: `out[token * rows + row]`.
struct Product {
  const uint8_t* weight;
  Format format;
  int64_t shared;  // groups of 32 columns that share a scale, of packed formats
  int64_t rows;
  int64_t width;
  float* out;
};

// A matrix and its grouped codes (`kernels/grouped.py`): `weights` are [rows][width] of float32 (`number` 0), float16 (1)
// or bfloat16 (2); scales and zero points, or null, [rows][groups] of float32 if `wide`, else of float16.
struct Grouping {
  void* weights;
  uint8_t* codes;
  void* scales;
  void* zeros;
  int64_t width;
  int64_t group;   // weights in a group; the last one of a row may be shorter
  int64_t groups;  // of a row
  int64_t row_bytes;
  int32_t number;
  int32_t bits;
  bool wide;
};

// A product modulo 2^32: `weight` is [rows][width], `limbs` [tokens][4 * padded] bytes as `split_limbs` makes them
// of int32 x [tokens][width], and `out` [tokens][rows].
struct RingProduct {
  const int8_t* weight;
  uint8_t* limbs;
  int64_t tokens;
  int64_t rows;
  int64_t width;
  int64_t padded;  // width, rounded up to a multiple of kRingPadding
  int32_t* out;
};

// Limbs fill whole vectors of every variant; together they take the four bytes of their number.
constexpr int64_t kRingPadding = 64;

// Columns whose sums stay in a core's nearest cache.
constexpr int64_t kRingColumnsTogether = 256;

// Activations [tokens][width] on their way out of the trusted side (`partition/ring.py`); pointers but x and scales may
// be null.
struct RingEncoding {
  const float* x;
  const int32_t* pads;  // [tokens][width]
  int64_t width;
  int32_t* masked;  // codes plus pads modulo 2^32
  int8_t* codes;
  float* scales;  // [tokens]
};

// Sums [tokens][width] on their way back; `pads`, `integers` and `out` may be null.
struct RingDecoding {
  const int32_t* sums;
  const int32_t* pads;         // what pads made of the sums
  const float* token_scales;   // [tokens]
  const float* output_scales;  // [width]
  int64_t width;
  int32_t bound;      // of magnitudes
  int32_t* integers;  // sums less pads modulo 2^32
  float* out;
};

struct Kernels {
  const char* name;
  // How many of `remaining` tokens the next block holds.
  int64_t (*token_block)(int64_t remaining);
  // Quantizes tokens [first, last), which must be whole blocks, of `x[tokens][width]`; width is a multiple of 32.
  void (*quantize)(const float* x, int64_t first, int64_t last, const Activations& to);
  // Lays tokens [first, last), which must be whole blocks, into blocks.
  void (*interleave)(const float* x, int64_t first, int64_t last, const FloatActivations& to);
  // Panels [first_panel, last_panel) of a packed product for the tokens [first, last), which must be whole blocks.
  void (*packed_product)(const Product& product, const Activations& x, int64_t first_panel, int64_t last_panel,
                         int64_t first, int64_t last);
  // Both for products of kInteger.
  void (*quantize_tokens)(const float* x, int64_t first, int64_t last, const IntegerActivations& to);
  void (*integer_product)(const Product& product, const IntegerActivations& x, int64_t first_panel, int64_t last_panel,
                          int64_t first, int64_t last);
  // The same for plain rows. `scratch` holds `16 * width` floats.
  void (*float_product)(const Product& product, const FloatActivations& x, int64_t first_panel, int64_t last_panel,
                        int64_t first, int64_t last, float* scratch);
  // Both for products of bfloat16 with bfloat16, or null: activations as pairs of the elements, rounded, and the product
  // with plain rows of bfloat16. Both take the memory that the two above take.
  void (*interleave_pairs)(const float* x, int64_t first, int64_t last, const FloatActivations& to);
  void (*bfloat16_product)(const Product& product, const FloatActivations& x, int64_t first_panel, int64_t last_panel,
                           int64_t first, int64_t last, float* scratch);
  // Rows [first, last) of a plain matrix times one token, `x[width]`, without any other preparation.
  void (*float_vector_product)(const Product& product, const float* x, int64_t first_row, int64_t last_row,
                               float* out);
  // Rotates the keys of tokens [first, last), counted through the batch, and writes keys and values into their pages.
  // `scratch` holds a head, rounded up to a multiple of sixteen floats.
  void (*write_cache)(const Attention& attention, int64_t first, int64_t last, float* scratch);
  // Attention of a block of queries; and how many floats of scratch it takes for so many queries.
  void (*prefill_attention)(const Attention& attention, const QueryBlock& item, float* scratch);
  int64_t (*prefill_floats)(const Attention& attention, int64_t queries);
  // Attention of the only query of a row over a chunk of keys; floats of its scratch, and of its partial result.
  void (*lone_attention)(const Attention& attention, const KeyChunk& chunk, float* scratch);
  int64_t (*lone_scratch_floats)(const Attention& attention);
  int64_t (*lone_partial_floats)(const Attention& attention);
  // The result of one row and kv head from its chunks' partial results, which lie one after the other.
  void (*merge_chunks)(const Attention& attention, int64_t row, int64_t kv_head, float* partials, int64_t count);
  // The largest of `size` floats; exp((x - largest) * inverse_temperature) of each, into `out`, and their sum.
  float (*largest_of)(const float* row, int64_t size);
  float (*exponentials_of)(const float* row, int64_t size, float largest, float inverse_temperature, float* out);
  // Appends to `found` who of row[begin, end) is above `threshold`, in order, until fewer than sixteen places are left.
  // Returns where it stopped.
  int64_t (*collect_above)(const float* row, int64_t begin, int64_t end, float threshold, int32_t* found, int* count,
                           int capacity);
  // The sum of `mass` where `row` is at least `threshold`.
  float (*mass_from)(const float* row, const float* mass, int64_t size, float threshold);
  // Rows [first, last): the norm of x, or with a delta `total` = x + delta and its norm.
  void (*norm_rows)(const float* x, const float* delta, const float* weight, float epsilon, int64_t width,
                    int64_t first, int64_t last, float* total, float* normed);
  // Elements [first, last) of silu(gate) * up.
  void (*swiglu)(const float* gate, const float* up, int64_t first, int64_t last, float* out);
  // Quantizes groups [begin, end) of a row; `sums` become its squared errors and squared weights. 1 where a weight is
  // infinite or no number, 2 where a scale is too large for float16, else 0. `grouping.cc` knows the size of `scratch`.
  int64_t (*encode_span)(const Grouping& of, int64_t row, int64_t begin, int64_t end, float* scratch,
                         double* sums);
  // The other way.
  void (*decode_span)(const Grouping& of, int64_t row, int64_t begin, int64_t end, float* scratch);
  // The limbs of tokens [first, last) of x.
  void (*split_limbs)(const int32_t* x, const RingProduct& to, int64_t first, int64_t last);
  // Rows [first_row, last_row) for tokens [first, last).
  void (*ring_product)(const RingProduct& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last);
  // Tokens [first, last) on their way out.
  void (*ring_encode)(const RingEncoding& of, int64_t first, int64_t last);
  // And back; whether no magnitude is above the bound.
  bool (*ring_decode)(const RingDecoding& of, int64_t first, int64_t last);
  // The sum of x[i] * secret[i] modulo 2^31 - 1, of secrets below that.
  uint32_t (*residue)(const int32_t* x, const uint32_t* secret, int64_t width);
  uint32_t (*residue_of_codes)(const int8_t* x, const uint32_t* secret, int64_t width);
  // Columns [first, last) of secrets[rounds][rows] times weight[rows][width] modulo 2^31 - 1, into out[rounds][width]; at
  // most kRingColumnsTogether columns.
  void (*weigh_columns)(const int8_t* weight, const uint32_t* secrets, int64_t rounds, int64_t rows, int64_t width,
                        int64_t first, int64_t last, uint32_t* out);
  // The largest sum of magnitudes of the rows [first, last) of weight[rows][width].
  int64_t (*largest_row)(const int8_t* weight, int64_t width, int64_t first, int64_t last);
  // A row of `width` in blocks of a power of two, each times the normalised Walsh-Hadamard matrix. `scratch` holds a block.
  void (*turn)(const float* x, int64_t width, int64_t block, float* scratch, float* out);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

}  // namespace fusedllm
