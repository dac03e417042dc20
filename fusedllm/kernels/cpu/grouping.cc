#include "grouping.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace fusedllm {
namespace {

// Weights of one item of work: with their codes they stay in a core's nearest caches.
constexpr int64_t kSpan = 16384;

bool makes_sense(const fusedllm_grouping& job) {
  constexpr int64_t kMost = int64_t{1} << 40;
  return job.weights != nullptr && job.codes != nullptr && job.scales != nullptr && job.rows > 0 && job.width > 0 &&
         job.rows < kMost && job.width < kMost && job.group >= 0 && job.group % 32 == 0 && job.group <= kSpan &&
         job.bits >= 3 && job.bits <= 8 && job.number >= 0 && job.number <= 2;
}

// A matrix as spans of whole groups of one row, and several rows to an item where rows are short.
struct Cut {
  int64_t spans;  // of a row
  int64_t groups; // of a span
  int64_t rows;   // of an item, where a row is one span

  explicit Cut(const fusedllm_grouping& job) {
    const int64_t all = job.group == 0 ? 1 : (job.width + job.group - 1) / job.group;
    groups = job.group == 0 ? 1 : std::min(all, kSpan / job.group);
    spans = (all + groups - 1) / groups;
    rows = spans > 1 ? 1 : std::max<int64_t>(1, kSpan / job.width);
  }

  int64_t items(const fusedllm_grouping& job) const { return (job.rows + rows - 1) / rows * spans; }
};

Grouping grouping_of(const fusedllm_grouping& job) {
  Grouping of;
  of.weights = job.weights;
  of.codes = job.codes;
  of.scales = job.scales;
  of.zeros = job.zeros;
  of.width = job.width;
  of.group = job.group == 0 ? job.width : job.group;
  of.groups = job.group == 0 ? 1 : (job.width + job.group - 1) / job.group;
  const int64_t unit = job.group == 0 ? (job.bits == 8 ? 1 : 8) : job.group;
  of.row_bytes = (job.width + unit - 1) / unit * unit * job.bits / 8;
  of.number = job.number;
  of.bits = job.bits;
  of.wide = job.wide != 0;
  return of;
}

// Floats of scratch that a span takes: weights, codes, and five numbers a group.
int64_t scratch_floats(const Grouping& of, const Cut& cut) {
  const int64_t padded = (of.group + 31) / 32 * 32;
  return cut.groups * padded + (cut.groups * padded + 3) / 4 + 5 * (cut.groups + 16);
}

// Calls span(item, row, begin, end, scratch) for the spans of all items.
template <typename Span>
void run_spans(const fusedllm_grouping& job, const Grouping& of, const Cut& cut, const Span& span) {
  const size_t floats = static_cast<size_t>(scratch_floats(of, cut));
  Pool::instance().run(cut.items(job), [&](int64_t item) {
    const std::unique_ptr<float[]> scratch(new float[floats]);
    const int64_t first = item / cut.spans * cut.rows, last = std::min(job.rows, first + cut.rows);
    const int64_t begin = item % cut.spans * cut.groups, end = std::min(of.groups, begin + cut.groups);
    for (int64_t row = first; row < last; ++row) span(item, row, begin, end, scratch.get());
  });
}

void encode(fusedllm_grouping& job) {
  const auto started = std::chrono::steady_clock::now();
  const Grouping of = grouping_of(job);
  const Cut cut(job);
  const Kernels& kernels = fusedllm::kernels();
  // An item's own, so that the sums do not depend on who was first.
  struct Sums {
    double error = 0.0, power = 0.0;
    int64_t problem = 0;
  };
  std::vector<Sums> items(static_cast<size_t>(cut.items(job)));
  run_spans(job, of, cut, [&](int64_t item, int64_t row, int64_t begin, int64_t end, float* scratch) {
    double sums[2];
    Sums& of_item = items[static_cast<size_t>(item)];
    of_item.problem |= kernels.encode_span(of, row, begin, end, scratch, sums);
    of_item.error += sums[0];
    of_item.power += sums[1];
  });
  Sums all;
  for (const Sums& one : items) {
    all.error += one.error;
    all.power += one.power;
    all.problem |= one.problem;
  }
  job.error = all.error;
  job.power = all.power;
  job.problem = all.problem;
  job.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

void decode(fusedllm_grouping& job) {
  const Grouping of = grouping_of(job);
  const Kernels& kernels = fusedllm::kernels();
  run_spans(job, of, Cut(job), [&](int64_t, int64_t row, int64_t begin, int64_t end, float* scratch) {
    kernels.decode_span(of, row, begin, end, scratch);
  });
}

template <typename Each>
int32_t each_job(fusedllm_grouping* jobs, int64_t count, const Each& each) {
  for (int64_t i = 0; i < count; ++i) {
    if (!makes_sense(jobs[i])) return -1;
  }
  try {
    for (int64_t i = 0; i < count; ++i) each(jobs[i]);
  } catch (const std::bad_alloc&) {
    return -2;
  }
  return 0;
}

}  // namespace
}  // namespace fusedllm

using namespace fusedllm;

int32_t fusedllm_encode(fusedllm_grouping* jobs, int64_t count) { return each_job(jobs, count, encode); }

int32_t fusedllm_decode(fusedllm_grouping* jobs, int64_t count) { return each_job(jobs, count, decode); }
