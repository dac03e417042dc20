#include "pool.h"

#include <chrono>
#include <exception>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fusedllm {
namespace {

// How long a worker watches for the next loop. Longer than what lies between two loops of a decode step, than the
// sampling between two steps, and than what the host does between two products where it drives each; short beside what a
// person calls idle.
constexpr auto kSpin = std::chrono::microseconds(300);
// A caller that has waited this long for a worker's last item shares its core with somebody else.
constexpr int kSpinsBeforeYield = 2000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How this thread's float operations round and treat denormal numbers. XLA's threads flush them to zero: with the
// caller's mode an item's result does not depend on who takes it.
uint64_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<uint32_t>(mode) & ~0x3fu);  // Without the flags of what has happened so far.
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

// Cores that this process may use.
int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

constexpr uint32_t loop_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
constexpr int64_t left_in(uint64_t ticket) { return static_cast<int64_t>(ticket & 0xffffffffu); }

}  // namespace

Pool& Pool::instance() {
  static std::atomic<Pool*> pool = [] {
#if defined(__linux__)
    // A forked process has none of the threads: it begins with a pool of its own.
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = pool.load()->threads();
      pool = new Pool();
      pool.load()->set_threads(threads);
    });
#endif
    return new Pool();
  }();
  return *pool.load(std::memory_order_acquire);
}

Pool::Pool() { set_threads(cores()); }

void Pool::set_threads(int count) {
  threads_ = count < 1 ? 1 : (count > kMostThreads ? kMostThreads : count);
}

void Pool::run_erased(int64_t items, Function function, const void* context) {
  const int threads = this->threads();
  if (items <= 1 || threads <= 1 || items >= 0x7fffffff || in_use_.exchange(true, std::memory_order_acquire)) {
    for (int64_t item = 0; item < items; ++item) function(context, item);
    return;
  }
  start_workers();
  // Nobody reads these now: the last loop's items are all taken, so taking one fails before its function is called.
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  items_.store(items, std::memory_order_relaxed);
  allowed_.store(threads - 1, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  float_mode_.store(float_mode(), std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  const uint32_t loop = loop_of(ticket_.load(std::memory_order_relaxed)) + 1;
  ticket_.store(static_cast<uint64_t>(loop) << 32 | static_cast<uint64_t>(items));
  if (sleeping_.load() > 0) {
    // Under the lock, so that a worker that is about to sleep has either seen the loop or hears this.
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  int64_t item;
  while (take(loop, items, &item)) call(function, context, item);
  for (int spins = 0; finished_.load(std::memory_order_acquire) < items; ++spins) {
    if (spins < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
  const bool failed = failed_.load(std::memory_order_relaxed);
  in_use_.store(false, std::memory_order_release);
  if (failed) throw std::bad_alloc();
}

// Whatever an item throws: the others still use what the caller's frame holds, and nobody would catch it in a worker.
void Pool::call(Function function, const void* context, int64_t item) {
  try {
    function(context, item);
  } catch (...) {
    failed_.store(true, std::memory_order_relaxed);
  }
  finished_.fetch_add(1, std::memory_order_acq_rel);
}

bool Pool::take(uint32_t loop, int64_t items, int64_t* item) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (loop_of(ticket) == loop && left_in(ticket) > 0) {
    if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
      *item = items - left_in(ticket);
      return true;
    }
  }
  return false;
}

void Pool::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_more(seen, index);
    const uint32_t loop = loop_of(ticket_.load(std::memory_order_acquire));
    seen = loop;
    const Function function = function_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t items = items_.load(std::memory_order_relaxed);
    const uint64_t mode = float_mode_.load(std::memory_order_relaxed);
    if (index >= allowed_.load(std::memory_order_relaxed)) continue;
    set_float_mode(mode);
    int64_t item;
    while (take(loop, items, &item)) call(function, context, item);
  }
}

void Pool::wait_for_more(uint32_t seen, int index) {
  const auto more = [&] {
    return loop_of(ticket_.load()) != seen && index < allowed_.load(std::memory_order_relaxed);
  };
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int spins = 0; spins < 32; ++spins) {
      if (more()) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(sleep_);
  sleeping_.fetch_add(1);
  wake_.wait(lock, more);
  sleeping_.fetch_sub(1);
}

void Pool::start_workers() {
  if (refused_) return;
  try {
    for (const int wanted = threads() - 1; started_ < wanted; ++started_) {
      std::thread([this, index = started_] { work(index); }).detach();
    }
  } catch (const std::exception&) {
    // The system allows no more threads: those that there are share the work.
    refused_ = true;
  }
}

}  // namespace fusedllm
