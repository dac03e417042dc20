// A pool of threads for loops of independent items, made for many short loops in a row.
//
// Not XLA's own pool: a decode step has some 150 loops of 5 to 50 microseconds, and a thread that has gone to sleep in
// between takes as long to wake as a loop takes to run. A worker here watches for the next loop for SPIN microseconds
// before it sleeps, so that a step never waits for a wake-up and an idle process burns nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace fusedllm {

class Pool {
 public:
  // The one pool of the process, as large as the cores that it may use; never destroyed, as its threads may outlive
  // static objects.
  static Pool& instance();

  // Threads that share a loop, the caller included.
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // Takes effect with the next loop; at least 1, at most kMostThreads.
  void set_threads(int count);

  // Calls body(item) for each item from 0 to items - 1 and returns when all have returned. A loop that finds the pool
  // in use (called from another loop, or by another thread) runs in the caller alone. A body may throw
  // std::bad_alloc; it is thrown on when all items are done with.
  template <typename Body>
  void run(int64_t items, const Body& body) {
    run_erased(items, [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
  }

  static constexpr int kMostThreads = 256;

 private:
  using Function = void (*)(const void*, int64_t);

  Pool();
  void run_erased(int64_t items, Function function, const void* context);
  void work(int index);
  bool take(uint32_t loop, int64_t items, int64_t* item);
  void wait_for_more(uint32_t seen, int index);
  void call(Function function, const void* context, int64_t item);
  void start_workers();

  std::atomic<int> threads_;
  std::atomic<bool> in_use_{false};  // a thread's loop runs
  int started_ = 0;                  // workers that exist; for that thread alone
  bool refused_ = false;             // the system has allowed no more; for that thread alone too
  std::atomic<bool> failed_{false};  // an item of the loop has thrown
  // High half: number of the loop; low half: how many of its items nobody has taken. One word, so that a worker that
  // is late for a loop can tell that it is: taking an item fails unless the loop is the one whose fields were read.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<int64_t> items_{0};
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint64_t> float_mode_{0};
  std::atomic<int> allowed_{0};  // workers with an index below this take part
  alignas(64) std::atomic<int> sleeping_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

}  // namespace fusedllm
