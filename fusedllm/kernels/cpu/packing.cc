#include "packing.h"

#include <cstring>

#include "pool.h"

namespace fusedllm {
namespace {

// How a format's blocks of 32 weights lie in a GGUF file (`ggml-common.h` of ggml).
struct Block {
  int bytes;
  int minimum;    // offset of the float16 minimum, or -1; the float16 scale is at 0
  int fifth_bits; // offset of 32 fifth bits, or -1
  int codes;      // offset of the codes
  bool bytewise;  // int8 instead of four bits
  int group_bytes;
};

constexpr Block kBlocks[] = {
    {18, -1, -1, 2, false, 256}, {20, 2, -1, 4, false, 256}, {22, -1, 2, 6, false, 320},
    {24, 2, 4, 8, false, 320},   {34, -1, -1, 2, true, 512},
};

bool is_packable(int32_t format, int64_t rows, int64_t width) {
  return format >= 0 && format < static_cast<int32_t>(Format::kBfloat16) && rows > 0 && width > 0 &&
         rows <= (int64_t{1} << 30) && width <= (int64_t{1} << 30) && width % kGroup == 0;
}

void pack_group(const Block& from, const uint8_t* block, int row, uint8_t* codes, uint8_t* scale, uint8_t* minimum) {
  std::memcpy(scale, block, 2);
  if (from.minimum >= 0) std::memcpy(minimum, block + from.minimum, 2);
  // Four elements at a time: they are neighbours in a block as in a panel, and GGUF too has element n below element
  // n + 16 in a byte.
  const uint8_t* source = block + from.codes;
  for (int j = 0; j < (from.bytewise ? 8 : 4); ++j) {
    uint32_t four;
    std::memcpy(&four, source + 4 * j, sizeof four);
    if (from.bytewise) four ^= 0x80808080u;
    std::memcpy(codes + 64 * j + 4 * row, &four, sizeof four);
  }
  if (from.fifth_bits < 0) return;
  for (int j = 0; j < 8; ++j) {
    const int bits = block[from.fifth_bits + j / 2] >> (j % 2 * 4) & 15;
    uint8_t& to = codes[256 + 8 * j + row / 2];
    to = static_cast<uint8_t>(to | bits << (row % 2 * 4));
  }
}

// IEEE 754 binary16.
float from_half(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  if (exponent == 0) value = (sign != 0 ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  return value;
}

}  // namespace

int64_t panel_bytes(Format format, int64_t width) {
  const Block& block = kBlocks[static_cast<int32_t>(format)];
  const int64_t numbers = block.minimum >= 0 ? 2 : 1;
  const int64_t used = width / kGroup * (block.group_bytes + numbers * 2 * kPanelRows);
  return (used + 63) / 64 * 64;
}

void unpack_row(Format format, int64_t width, const uint8_t* packed, int64_t row, float* out) {
  const Block& block = kBlocks[static_cast<int32_t>(format)];
  const int64_t groups = width / kGroup, lane = row % kPanelRows;
  const uint8_t* panel = packed + row / kPanelRows * panel_bytes(format, width);
  const uint8_t* scales = panel + groups * block.group_bytes;
  const uint8_t* minimums = scales + groups * 2 * kPanelRows;
  const int offset = block.minimum >= 0 ? 0 : (block.bytewise ? 128 : (block.fifth_bits >= 0 ? 16 : 8));
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* codes = panel + group * block.group_bytes;
    const int64_t number = 2 * (group * kPanelRows + lane);
    const float scale = from_half(scales + number);
    const float minimum = block.minimum >= 0 ? from_half(minimums + number) : 0.0f;
    for (int element = 0; element < kGroup; ++element) {
      const int64_t at = 4 * lane + element % 4;
      const int j = element / 4;
      int code = block.bytewise ? codes[64 * j + at] : (codes[64 * (j % 4) + at] >> (j < 4 ? 0 : 4) & 15);
      if (block.fifth_bits >= 0) code += (codes[256 + 8 * j + at / 8] >> (at % 8) & 1) << 4;
      out[group * kGroup + element] = scale * static_cast<float>(code - offset) + minimum;
    }
  }
}

}  // namespace fusedllm

using namespace fusedllm;

int64_t fusedllm_packed_bytes(int32_t format, int64_t rows, int64_t width) {
  if (!is_packable(format, rows, width)) return -1;
  return (rows + kPanelRows - 1) / kPanelRows * panel_bytes(static_cast<Format>(format), width);
}

int32_t fusedllm_pack(int32_t format, int64_t rows, int64_t width, const uint8_t* blocks, uint8_t* packed) {
  if (!is_packable(format, rows, width)) return -1;
  const Block& from = kBlocks[format];
  const int64_t groups = width / kGroup, bytes = panel_bytes(static_cast<Format>(format), width);
  Pool::instance().run((rows + kPanelRows - 1) / kPanelRows, [&](int64_t panel) {
    uint8_t* to = packed + panel * bytes;
    uint8_t* scales = to + groups * from.group_bytes;
    uint8_t* minimums = scales + groups * 2 * kPanelRows;
    const int64_t first = panel * kPanelRows;
    const bool whole = first + kPanelRows <= rows;
    // Fifth bits are set one by one, rows past the last and the end of a panel not at all.
    if (!whole || from.fifth_bits >= 0) {
      std::memset(to, 0, static_cast<size_t>(bytes));
    } else {
      std::memset(to + bytes - 64, 0, 64);
    }
    for (int row = 0; row < kPanelRows && first + row < rows; ++row) {
      const uint8_t* block = blocks + (first + row) * groups * from.bytes;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t number = 2 * (group * kPanelRows + row);
        pack_group(from, block + group * from.bytes, row, to + group * from.group_bytes, scales + number,
                   minimums + number);
      }
    }
  });
  return 0;
}
