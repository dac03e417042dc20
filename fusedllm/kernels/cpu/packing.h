// From the blocks of a GGUF file, or the grouped codes of our own schemes, to packed panels; and back for single rows.
//
// A panel is sixteen rows of a matrix: first the codes of all groups of 32 columns, then sixteen float16 scales for each
// `shared` groups (the last may be fewer), then (where the format has them) as many float16 minimums or zero points, and
// zeros up to a multiple of 64 bytes. Rows past the matrix's last one are zeros. Blocks of GGUF have a scale for each
// group (`shared` = 1); of the formats only kQ4, kQ4Zero and kQ8 may have fewer, and kInteger has one for a row. A group:
//   4 bits: four times 64 bytes. Byte 4 r + i of the j-th holds of row r element 4 j + i in its low four bits and
//           element 16 + 4 j + i in its high ones.
//   5 bits: the low four bits as above, then eight times 64 bits. Bit 4 r + i of the j-th: fifth bit of element 4 j + i.
//   8 bits: eight times 64 bytes. Byte 4 r + i of the j-th: element 4 j + i of row r, plus 128.
#pragma once

#include <cstdint>

#include "variant.h"

namespace fusedllm {

// Bytes of a panel of a matrix of `width` columns of which `shared` groups have a scale.
int64_t panel_bytes(Format format, int64_t shared, int64_t width);

// The values of row `row` of a packed matrix of `width` columns.
void unpack_row(Format format, int64_t shared, int64_t width, const uint8_t* packed, int64_t row, float* out);

}  // namespace fusedllm

extern "C" {
// Bytes of a packed matrix, or -1 for a format that is not packed or not with so many groups a scale, and for a width
// that is no multiple of 32.
int64_t fusedllm_packed_bytes(int32_t format, int64_t shared, int64_t rows, int64_t width);
// Packs `rows` rows of GGUF blocks (Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, as `format` says). All threads of the pool take
// part. 0, or -1 for what `fusedllm_packed_bytes` refuses.
int32_t fusedllm_pack(int32_t format, int64_t rows, int64_t width, const uint8_t* blocks, uint8_t* packed);
// Packs `rows` rows of grouped codes (`kernels/grouped.py`) of 3, 4 or 8 `bits` into kQ4, kQ4Zero, kQ8 or kInteger:
// `codes[rows][row_bytes]`, float16 `scales[rows][n]` and, for kQ4Zero, `zeros[rows][n]`, n being how many times
// `shared` groups a row has. All threads take part. 0, or -1 for what `fusedllm_packed_bytes` refuses, and for codes that
// the format does not hold.
int32_t fusedllm_pack_grouped(int32_t format, int64_t shared, int64_t rows, int64_t width, int32_t bits,
                              int64_t row_bytes, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros,
                              uint8_t* packed);
}
