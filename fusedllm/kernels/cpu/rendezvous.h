// Where a program that runs on a device of this CPU meets the trusted thread that feeds it (`partition/in_program.py`).
//
// The program stops at each product and asks for what it multiplies next, handing over the last product's results; the
// trusted thread says which product that is, of how many bytes, and waits. Only what the trusted side has said counts:
// a request of another number, or of other sizes, or one too many, ends the pass. Bytes are copied under the meeting's
// lock, so that after `end` the program reaches no memory of the trusted side.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace fusedllm {

class Rendezvous {
 public:
  enum Outcome : int32_t { kDone = 0, kNotYet = 1, kEnded = -1, kOutOfOrder = -2, kOtherSize = -3 };
  static constexpr int kMostResults = 8;
  static constexpr int64_t kNothing = -1;  // the number of no product

  // What a product takes, and gives.
  struct Message {
    int64_t number = kNothing;
    const void* sent = nullptr;
    int64_t sent_bytes = 0;
    int32_t results = 0;
    void* into[kMostResults] = {};
    int64_t bytes[kMostResults] = {};
  };

  // The trusted side's. A pass begins where nothing is under way and ends with `end`, by which a program that waits
  // fails. `post` says what the program multiplies next; `wait` waits for the results, some time at most.
  void begin();
  void end();
  Outcome post(const Message& message);
  Outcome wait(std::chrono::microseconds most);

  // The program's: hands over the results of the product `last` (kNothing for none), then waits for what is to be
  // multiplied by the product `number`, and takes it (kNothing: takes nothing, it was the last).
  struct Results {
    int32_t count = 0;
    const void* from[kMostResults] = {};
    int64_t bytes[kMostResults] = {};
  };
  Outcome ask(int64_t last, const Results& results, int64_t number, void* into, int64_t bytes);

 private:
  enum Phase : uint32_t {
    kClosed,   // no pass: nobody waits
    kIdle,     // the program computes nothing that anybody waits for
    kPosted,   // the trusted side waits for the program to take what it has sent
    kTaken,    // and for the results
    kReady,    // which are there
    kBroken,   // the program has asked for what it was not told to
  };

  // Whether `there` came to hold, which reads atomic fields alone: it is watched without the lock for a while.
  template <typename Predicate>
  bool wait_until(std::unique_lock<std::mutex>& lock, const Predicate& there,
                  const std::chrono::steady_clock::time_point* until);
  void turn(Phase phase);
  Outcome broken(Outcome why);

  std::atomic<uint32_t> phase_{kClosed};
  std::mutex mutex_;
  std::condition_variable turned_;
  int waiting_ = 0;  // threads that sleep
  Message message_;
  std::atomic<uint64_t> pass_{0};  // a program that waits since an earlier one is late, and ends
  Outcome why_ = kEnded;
};

}  // namespace fusedllm

// Of `kernels/native_rendezvous.py`. They return an `Outcome`, or -4 for arguments that make no sense.
extern "C" {
// The number of a place that nobody uses, or -1 where all are in use. Programs name it, so it is the lowest.
int32_t fusedllm_rendezvous_open();
void fusedllm_rendezvous_close(int32_t place);
int32_t fusedllm_rendezvous_begin(int32_t place);
int32_t fusedllm_rendezvous_end(int32_t place);
// Sends, and waits for the results, `microseconds` at most; where they are not there by then, `wait` waits on.
int32_t fusedllm_rendezvous_exchange(int32_t place, int64_t number, const void* sent, int64_t sent_bytes,
                                     int32_t results, void* const* into, const int64_t* bytes, int64_t microseconds);
int32_t fusedllm_rendezvous_wait(int32_t place, int64_t microseconds);
}
