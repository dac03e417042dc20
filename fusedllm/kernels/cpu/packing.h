// From the blocks of a GGUF file to packed panels, and back for single rows.
//
// A panel is sixteen rows of a matrix: first the codes of all groups of 32 columns, then sixteen float16 scales for each
// group, then (where the format has them) sixteen float16 minimums for each group, and zeros up to a multiple of 64
// bytes. Rows past the matrix's last one are zeros. A group's codes:
//   4 bits: four times 64 bytes. Byte 4 r + i of the j-th holds of row r element 4 j + i in its low four bits and
//           element 16 + 4 j + i in its high ones.
//   5 bits: the low four bits as above, then eight times 64 bits. Bit 4 r + i of the j-th: fifth bit of element 4 j + i.
//   8 bits: eight times 64 bytes. Byte 4 r + i of the j-th: element 4 j + i of row r, plus 128.
#pragma once

#include <cstdint>

#include "variant.h"

namespace fusedllm {

// Bytes of a panel of a matrix of `width` columns.
int64_t panel_bytes(Format format, int64_t width);

// The values of row `row` of a packed matrix of `width` columns.
void unpack_row(Format format, int64_t width, const uint8_t* packed, int64_t row, float* out);

}  // namespace fusedllm

extern "C" {
// Bytes of a packed matrix, or -1 for a format that is not packed or a width that is no multiple of 32.
int64_t fusedllm_packed_bytes(int32_t format, int64_t rows, int64_t width);
// Packs `rows` rows of GGUF blocks (Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, as `format` says). All threads of the pool take
// part. 0, or -1 for what `fusedllm_packed_bytes` refuses.
int32_t fusedllm_pack(int32_t format, int64_t rows, int64_t width, const uint8_t* blocks, uint8_t* packed);
}
