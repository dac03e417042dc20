#include "packing.h"

#include <cstring>
#include <iterator>

#include "pool.h"

namespace fusedllm {
namespace {

// What a packed format's codes mean, by the format's number.
struct Layout {
  int bits;
  int offset;        // is subtracted from a code
  bool has_minimums;
  bool has_zeros;
  bool shares;       // several groups may share a scale

  constexpr int64_t group_bytes() const { return kPanelRows * kGroup * bits / 8; }
  // Of a panel's scales (minimums, zero points) for one or more groups.
  static constexpr int64_t kNumberBytes = 2 * kPanelRows;
  constexpr int64_t numbers() const { return 1 + has_minimums + has_zeros; }
};

constexpr Layout kLayouts[] = {
    {4, 8, false, false, true},    // kQ4
    {4, 0, true, false, false},    // kQ4Min
    {5, 16, false, false, false},  // kQ5
    {5, 0, true, false, false},    // kQ5Min
    {8, 128, false, false, true},  // kQ8
    {4, 0, false, true, true},     // kQ4Zero
    {8, 128, false, false, true},  // kInteger
};
static_assert(std::size(kLayouts) == static_cast<size_t>(Format::kBfloat16));

const Layout& layout_of(Format format) { return kLayouts[static_cast<int32_t>(format)]; }

// How a format's blocks of 32 weights lie in a GGUF file (`ggml-common.h` of ggml).
struct Block {
  int bytes;
  int minimum;    // offset of the float16 minimum, or -1; the float16 scale is at 0
  int fifth_bits; // offset of 32 fifth bits, or -1
  int codes;      // offset of the codes
  bool bytewise;  // int8 instead of four bits
};

constexpr Block kBlocks[] = {
    {18, -1, -1, 2, false}, {20, 2, -1, 4, false}, {22, -1, 2, 6, false}, {24, 2, 4, 8, false}, {34, -1, -1, 2, true},
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_packable(int32_t format, int64_t shared, int64_t rows, int64_t width) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (format < 0 || format >= static_cast<int32_t>(Format::kBfloat16)) return false;
  if (rows <= 0 || width <= 0 || rows > kMost || width > kMost || width % kGroup != 0) return false;
  if (static_cast<Format>(format) == Format::kInteger) {
    return shared == width / kGroup && width <= kMostIntegerColumns;
  }
  return shared == 1 || (shared > 1 && shared <= kMost && kLayouts[format].shares);
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

// Four of a row's codes, the j-th four of a group of grouped codes, a byte each; those of eight bits plus 128.
template <int kBits>
uint32_t four_codes(const uint8_t* group, int j) {
  if constexpr (kBits == 8) {
    uint32_t four;
    std::memcpy(&four, group + 4 * j, sizeof four);
    return four ^ 0x80808080u;
  } else {
    const int first = 4 * kBits * j;
    const uint32_t both = group[first / 8] | static_cast<uint32_t>(group[first / 8 + 1]) << 8;
    uint32_t four = 0;
    for (int i = 0; i < 4; ++i) four |= (both >> (first % 8 + kBits * i) & ((1u << kBits) - 1)) << (8 * i);
    return four;
  }
}

// A row of `groups` groups into its panel; `added` is added to each code.
template <int kBits>
void pack_codes(const uint8_t* from, int64_t groups, uint32_t added, int row, uint8_t* codes) {
  constexpr int kBytes = kBits == 8 ? 512 : 256;
  for (int64_t group = 0; group < groups; ++group) {
    for (int j = 0; j < kBytes / 64; ++j) {
      uint32_t four = four_codes<kBits>(from, j) + added;
      if constexpr (kBits < 8) four |= (four_codes<kBits>(from, j + 4) + added) << 4;
      std::memcpy(codes + 64 * j + 4 * row, &four, sizeof four);
    }
    from += kGroup * kBits / 8;
    codes += kBytes;
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

int64_t panel_bytes(Format format, int64_t shared, int64_t width) {
  const Layout& layout = layout_of(format);
  const int64_t groups = width / kGroup;
  const int64_t used =
      groups * layout.group_bytes() + divide_up(groups, shared) * layout.numbers() * Layout::kNumberBytes;
  return divide_up(used, 64) * 64;
}

void unpack_row(Format format, int64_t shared, int64_t width, const uint8_t* packed, int64_t row, float* out) {
  const Layout& layout = layout_of(format);
  const int64_t groups = width / kGroup, lane = row % kPanelRows;
  const uint8_t* panel = packed + row / kPanelRows * panel_bytes(format, shared, width);
  const uint8_t* scales = panel + groups * layout.group_bytes() + 2 * lane;
  const uint8_t* others = scales + divide_up(groups, shared) * Layout::kNumberBytes;
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* codes = panel + group * layout.group_bytes();
    const int64_t number = group / shared * Layout::kNumberBytes;
    const float scale = from_half(scales + number);
    const float minimum = layout.has_minimums ? from_half(others + number) : 0.0f;
    const float zero = layout.has_zeros ? from_half(others + number) : static_cast<float>(layout.offset);
    for (int element = 0; element < kGroup; ++element) {
      const int64_t at = 4 * lane + element % 4;
      const int j = element / 4;
      int code = layout.bits == 8 ? codes[64 * j + at] : (codes[64 * (j % 4) + at] >> (j < 4 ? 0 : 4) & 15);
      if (layout.bits == 5) code += (codes[256 + 8 * j + at / 8] >> (at % 8) & 1) << 4;
      out[group * kGroup + element] = scale * (static_cast<float>(code) - zero) + minimum;
    }
  }
}

}  // namespace fusedllm

using namespace fusedllm;

int64_t fusedllm_packed_bytes(int32_t format, int64_t shared, int64_t rows, int64_t width) {
  if (!is_packable(format, shared, rows, width)) return -1;
  return divide_up(rows, kPanelRows) * panel_bytes(static_cast<Format>(format), shared, width);
}

int32_t fusedllm_pack(int32_t format, int64_t rows, int64_t width, const uint8_t* blocks, uint8_t* packed) {
  if (!is_packable(format, 1, rows, width) || format >= static_cast<int32_t>(std::size(kBlocks))) return -1;
  const Block& from = kBlocks[format];
  const int64_t group_bytes = kLayouts[format].group_bytes();
  const int64_t groups = width / kGroup, bytes = panel_bytes(static_cast<Format>(format), 1, width);
  Pool::instance().run(divide_up(rows, kPanelRows), [&](int64_t panel) {
    uint8_t* to = packed + panel * bytes;
    uint8_t* scales = to + groups * group_bytes;
    uint8_t* minimums = scales + groups * Layout::kNumberBytes;
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
        const int64_t number = group * Layout::kNumberBytes + 2 * row;
        pack_group(from, block + group * from.bytes, row, to + group * group_bytes, scales + number, minimums + number);
      }
    }
  });
  return 0;
}

int32_t fusedllm_pack_grouped(int32_t format, int64_t shared, int64_t rows, int64_t width, int32_t bits,
                              int64_t row_bytes, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros,
                              uint8_t* packed) {
  if (!is_packable(format, shared, rows, width)) return -1;
  const Layout& layout = kLayouts[format];
  const bool holds = layout.bits == 8 ? bits == 8 : (layout.bits == 4 && (bits == 3 || bits == 4));
  if (!holds || layout.has_minimums || layout.has_zeros != (zeros != nullptr)) return -1;
  if (row_bytes < width * bits / 8) return -1;
  const int64_t groups = width / kGroup, numbers = divide_up(groups, shared);
  const int64_t bytes = panel_bytes(static_cast<Format>(format), shared, width);
  // Symmetric codes of fewer bits have their zero in the middle too.
  const uint32_t added = bits == 3 && !layout.has_zeros ? 0x04040404u : 0;
  const auto pack = bits == 8 ? pack_codes<8> : (bits == 4 ? pack_codes<4> : pack_codes<3>);
  Pool::instance().run(divide_up(rows, kPanelRows), [&](int64_t panel) {
    uint8_t* to = packed + panel * bytes;
    uint8_t* to_scales = to + groups * layout.group_bytes();
    uint8_t* to_zeros = to_scales + numbers * Layout::kNumberBytes;
    const int64_t first = panel * kPanelRows;
    if (first + kPanelRows <= rows) {
      std::memset(to + bytes - 64, 0, 64);
    } else {
      std::memset(to, 0, static_cast<size_t>(bytes));
    }
    for (int row = 0; row < kPanelRows && first + row < rows; ++row) {
      pack(codes + (first + row) * row_bytes, groups, added, row, to);
      for (int64_t number = 0; number < numbers; ++number) {
        const int64_t at = number * Layout::kNumberBytes + 2 * row, from = (first + row) * numbers + number;
        std::memcpy(to_scales + at, scales + from, 2);
        if (layout.has_zeros) std::memcpy(to_zeros + at, zeros + from, 2);
      }
    }
  });
  return 0;
}
