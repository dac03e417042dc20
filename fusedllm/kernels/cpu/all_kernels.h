// Every operation, and the table of them. Included once by each variant, inside its namespace.
#include "quantize_kernel.h"
#include "packed_product_kernel.h"
#include "integer_product_kernel.h"
#include "float_product_kernel.h"
#include "bfloat16_product_kernel.h"
#include "exp_kernel.h"
#include "cache_kernel.h"
#include "prefill_attention_kernel.h"
#include "lone_attention_kernel.h"
#include "draw_kernel.h"
#include "rows_kernel.h"
#include "grouping_kernel.h"
#include "hadamard_kernel.h"
#include "ring_kernel.h"

constexpr Kernels kTable = {
    kName, token_block, quantize, interleave, packed_product, quantize_tokens, integer_product, float_product,
    interleave_pairs, bfloat16_product, float_vector_product,
    write_cache, prefill_attention, prefill_floats, lone_attention, lone_scratch_floats, lone_partial_floats,
    merge_chunks, largest_of, exponentials_of, collect_above, mass_from, norm_rows, swiglu, encode_span,
    decode_span, split_limbs, ring_product, ring_encode, ring_decode, residue, residue_of_codes,
    weigh_columns, largest_row, turn,
};
