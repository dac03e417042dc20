#include "ring.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "ffi_support.h"
#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

// As in ffi_linear.cc: parts of a loop for each thread, weights of a part that stay in a core's second-level cache
// while many tokens pass, and the least work that is shared.
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kManyPartsPerThread = 16;
constexpr int64_t kCachedBytes = 256 * 1024;
constexpr int64_t kFewTokens = 2;
constexpr int64_t kFewestTokens = 32;
constexpr int64_t kPart = 16384;
// Rows of a part are a multiple of this, which every variant's blocks of rows divide.
constexpr int64_t kRowUnit = 12;
constexpr int64_t kMost = int64_t{1} << 30;

constexpr int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

bool make_sense(int64_t tokens, int64_t width) { return tokens >= 0 && tokens <= kMost && width > 0 && width <= kMost; }

// Calls body(first, last) for parts of all tokens, of about kPart elements each.
template <typename Body>
void over_tokens(int64_t tokens, int64_t width, const Body& body) {
  const int64_t part = std::max<int64_t>(1, kPart / width);
  Pool::instance().run((tokens + part - 1) / part, [&](int64_t item) {
    body(item * part, std::min(tokens, (item + 1) * part));
  });
}

// What the compiler may not leave out, although nobody reads the memory again.
void overwrite(void* memory, size_t bytes) {
  std::memset(memory, 0, bytes);
  asm volatile("" : : "r"(memory) : "memory");
}

template <typename Function>
int32_t guarded(const Function& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

}  // namespace

void ring_product(const int32_t* x, const int8_t* weight, int64_t tokens, int64_t width, int64_t rows, bool wipe,
                  int32_t* out) {
  if (tokens == 0) return;
  const Kernels& kernels = fusedllm::kernels();
  const int64_t padded = rounded_up(width, kRingPadding), bytes = tokens * padded * 4;
  static thread_local Scratch scratch;
  const RingProduct product{weight, scratch.of<uint8_t>(bytes), tokens, rows, width, padded, out};
  over_tokens(tokens, width, [&](int64_t first, int64_t last) { kernels.split_limbs(x, product, first, last); });

  const int64_t threads = Pool::instance().threads();
  int64_t chunks = kPartsPerThread * threads, token_parts = 1, tokens_a_part = tokens;
  if (tokens > kFewTokens) {
    chunks = std::max(chunks, (rows * width + kCachedBytes - 1) / kCachedBytes);
    const int64_t parts = (kManyPartsPerThread * threads + chunks - 1) / chunks;
    tokens_a_part = std::max(kFewestTokens, rounded_up((tokens + parts - 1) / parts, kFewTokens));
    token_parts = (tokens + tokens_a_part - 1) / tokens_a_part;
  }
  const int64_t chunk_rows = rounded_up((rows + chunks - 1) / chunks, kRowUnit);
  chunks = (rows + chunk_rows - 1) / chunk_rows;
  Pool::instance().run(chunks * token_parts, [&](int64_t item) {
    const int64_t row = item % chunks * chunk_rows, token = item / chunks * tokens_a_part;
    kernels.ring_product(product, row, std::min(rows, row + chunk_rows), token,
                         std::min(tokens, token + tokens_a_part));
  });
  if (wipe) overwrite(product.limbs, static_cast<size_t>(bytes));
}

}  // namespace fusedllm

using namespace fusedllm;

int32_t fusedllm_ring_product(const int32_t* x, const int8_t* weight, int64_t tokens, int64_t width, int64_t rows,
                              int32_t* out) {
  if (!make_sense(tokens, width) || !make_sense(rows, width) || rows == 0) return -1;
  return guarded([&] {
    ring_product(x, weight, tokens, width, rows, true, out);
    return 0;
  });
}

int32_t fusedllm_ring_encode(const float* x, const int32_t* pads, int64_t tokens, int64_t width, int64_t block,
                             int32_t* masked, int8_t* codes, float* scales) {
  if (!make_sense(tokens, width) || block < 0 || (block & (block - 1)) != 0 || (block != 0 && width % block != 0)) {
    return -1;
  }
  const Kernels& kernels = fusedllm::kernels();
  const RingEncoding encoding{x, pads, width, masked, codes, scales};
  over_tokens(tokens, width, [&](int64_t first, int64_t last) {
    if (block == 0) return kernels.ring_encode(encoding, first, last);
    static thread_local Scratch scratch;
    float* turned = scratch.of<float>(width + block);
    for (int64_t token = first; token < last; ++token) {
      const int64_t start = token * width;
      kernels.turn(x + start, width, block, turned + width, turned);
      const RingEncoding one{turned,
                             pads == nullptr ? nullptr : pads + start,
                             width,
                             masked == nullptr ? nullptr : masked + start,
                             codes == nullptr ? nullptr : codes + start,
                             scales + token};
      kernels.ring_encode(one, 0, 1);
    }
  });
  return 0;
}

int32_t fusedllm_ring_decode(const int32_t* sums, const int32_t* pads, const float* token_scales,
                             const float* output_scales, int64_t tokens, int64_t width, int32_t bound,
                             int32_t* integers, float* out) {
  if (!make_sense(tokens, width)) return -1;
  const Kernels& kernels = fusedllm::kernels();
  const RingDecoding decoding{sums, pads, token_scales, output_scales, width, bound, integers, out};
  std::atomic<bool> inside{true};
  over_tokens(tokens, width, [&](int64_t first, int64_t last) {
    if (!kernels.ring_decode(decoding, first, last)) inside.store(false, std::memory_order_relaxed);
  });
  return inside.load() ? 0 : 1;
}

int32_t fusedllm_ring_residues(const void* x, int32_t codes, const uint32_t* secrets, int64_t rounds, int64_t tokens,
                               int64_t width, uint32_t* residues) {
  if (!make_sense(tokens, width) || rounds < 1 || rounds > 64) return -1;
  const Kernels& kernels = fusedllm::kernels();
  over_tokens(tokens, width * rounds, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      for (int64_t round = 0; round < rounds; ++round) {
        const uint32_t* secret = secrets + round * width;
        residues[token * rounds + round] =
            codes ? kernels.residue_of_codes(static_cast<const int8_t*>(x) + token * width, secret, width)
                  : kernels.residue(static_cast<const int32_t*>(x) + token * width, secret, width);
      }
    }
  });
  return 0;
}

int32_t fusedllm_ring_weigh(const int8_t* weight, const uint32_t* secrets, int64_t rounds, int64_t rows, int64_t width,
                            uint32_t* out) {
  if (!make_sense(rows, width) || rows > int64_t{1} << 25 || rounds < 1 || rounds > 64) return -1;
  const Kernels& kernels = fusedllm::kernels();
  Pool::instance().run((width + kRingColumnsTogether - 1) / kRingColumnsTogether, [&](int64_t item) {
    const int64_t first = item * kRingColumnsTogether;
    kernels.weigh_columns(weight, secrets, rounds, rows, width, first, std::min(width, first + kRingColumnsTogether),
                          out);
  });
  return 0;
}

int32_t fusedllm_ring_largest_row(const int8_t* weight, int64_t rows, int64_t width, int64_t* largest) {
  if (!make_sense(rows, width) || width > kMostIntegerColumns) return -1;
  const Kernels& kernels = fusedllm::kernels();
  std::atomic<int64_t> most{0};
  over_tokens(rows, width, [&](int64_t first, int64_t last) {
    const int64_t found = kernels.largest_row(weight, width, first, last);
    int64_t seen = most.load();
    while (found > seen && !most.compare_exchange_weak(seen, found)) {
    }
  });
  *largest = most.load();
  return 0;
}
