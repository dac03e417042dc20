#include "rendezvous.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "ffi_support.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedllm {
namespace {

// How long a side watches for the other before it sleeps. Longer than it takes to wake a thread (50 to 100 microseconds
// on a virtual machine): with less, both sides go on sleeping while the other one wakes, at each crossing. A side that
// watches gives its core to whoever has work for it, the other side among them; an idle process burns nothing.
constexpr auto kSpin = std::chrono::microseconds(200);
// Of one process.
constexpr int kPlaces = 64;
// Bytes that a thread copies; of more than two parts the pool's threads copy some each.
constexpr int64_t kPart = int64_t{1} << 18;

struct Place {
  std::atomic<bool> used{false};
  Rendezvous meeting;
};

// Never destroyed: a program may wait in one when static objects are.
std::array<Place, kPlaces>& places() {
  static auto* all = new std::array<Place, kPlaces>();
  return *all;
}

Rendezvous* meeting(int64_t place) {
  if (place < 0 || place >= kPlaces || !places()[place].used.load(std::memory_order_acquire)) return nullptr;
  return &places()[place].meeting;
}

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void copy(void* into, const void* from, int64_t bytes) {
  const int64_t parts = (bytes + kPart - 1) / kPart;
  const auto one = [&](int64_t first, int64_t size) {
    std::memcpy(static_cast<char*>(into) + first, static_cast<const char*>(from) + first, static_cast<size_t>(size));
  };
  if (parts <= 2) return one(0, bytes);
  Pool::instance().run(parts, [&](int64_t part) { one(part * kPart, std::min(kPart, bytes - part * kPart)); });
}

}  // namespace

template <typename Predicate>
bool Rendezvous::wait_until(std::unique_lock<std::mutex>& lock, const Predicate& there,
                            const std::chrono::steady_clock::time_point* until) {
  if (!there()) {
    lock.unlock();
    const auto enough = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int spin = 0; spin < 32 && !there(); ++spin) relax();
      if (!there()) std::this_thread::yield();
    } while (!there() && std::chrono::steady_clock::now() < enough);
    lock.lock();
  }
  ++waiting_;
  bool came = true;
  if (until == nullptr) {
    turned_.wait(lock, there);
  } else {
    came = turned_.wait_until(lock, *until, there);
  }
  --waiting_;
  return came;
}

void Rendezvous::turn(Phase phase) {
  phase_.store(phase, std::memory_order_release);
  if (waiting_ > 0) turned_.notify_all();
}

Rendezvous::Outcome Rendezvous::broken(Outcome why) {
  why_ = why;
  message_ = Message();
  turn(kBroken);
  return why;
}

void Rendezvous::begin() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++pass_;
  message_ = Message();
  turn(kIdle);
}

void Rendezvous::end() {
  std::lock_guard<std::mutex> lock(mutex_);
  message_ = Message();
  turn(kClosed);
}

Rendezvous::Outcome Rendezvous::post(const Message& message) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (phase == kClosed) return kEnded;
  if (phase == kBroken) return why_;
  if (phase == kPosted || phase == kTaken) return kOutOfOrder;
  message_ = message;
  turn(kPosted);
  return kDone;
}

Rendezvous::Outcome Rendezvous::wait(std::chrono::microseconds most) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto until = std::chrono::steady_clock::now() + most;
  const auto there = [&] {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    return phase != kPosted && phase != kTaken;
  };
  if (!wait_until(lock, there, &until)) return kNotYet;
  switch (phase_.load(std::memory_order_relaxed)) {
    case kReady:
      turn(kIdle);
      return kDone;
    case kBroken:
      return why_;
    default:
      return kEnded;
  }
}

Rendezvous::Outcome Rendezvous::ask(int64_t last, const Results& results, int64_t number, void* into, int64_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto phase = [&] { return phase_.load(std::memory_order_relaxed); };
  if (phase() == kClosed) return kEnded;
  if (phase() == kBroken) return why_;
  if ((last == kNothing) != (phase() != kTaken)) return broken(kOutOfOrder);
  if (last != kNothing) {
    if (last != message_.number) return broken(kOutOfOrder);
    if (results.count != message_.results ||
        !std::equal(results.bytes, results.bytes + results.count, message_.bytes)) {
      return broken(kOtherSize);
    }
    for (int32_t result = 0; result < results.count; ++result) {
      copy(message_.into[result], results.from[result], results.bytes[result]);
    }
    message_ = Message();
    turn(kReady);
  }
  if (number == kNothing) {
    std::memset(into, 0, static_cast<size_t>(bytes));
    return kDone;
  }
  const uint64_t pass = pass_.load();
  const auto there = [&] {
    return phase() == kPosted || phase() == kClosed || phase() == kBroken || pass != pass_.load();
  };
  wait_until(lock, there, nullptr);
  if (phase() == kClosed || pass != pass_.load()) return kEnded;
  if (phase() == kBroken) return why_;
  if (number != message_.number) return broken(kOutOfOrder);
  if (bytes != message_.sent_bytes) return broken(kOtherSize);
  copy(into, message_.sent, bytes);
  turn(kTaken);
  return kDone;
}

namespace {

ffi::Error said(Rendezvous::Outcome outcome) {
  switch (outcome) {
    case Rendezvous::kDone:
      return ffi::Error::Success();
    case Rendezvous::kOutOfOrder:
      return refuse("rendezvous: the program's request is not the next one.");
    case Rendezvous::kOtherSize:
      return refuse("rendezvous: the program's request is of another size.");
    default:
      return ffi::Error(ffi::ErrorCode::kCancelled, "fusedllm: rendezvous: the pass has ended.");
  }
}

ffi::Error ask(ffi::RemainingArgs results, ffi::RemainingRets next, int64_t place, int64_t last, int64_t number) {
  Rendezvous* const found = meeting(place);
  if (found == nullptr) return said(Rendezvous::kEnded);
  if (results.size() > Rendezvous::kMostResults || next.size() != 1) {
    return refuse("rendezvous: a product has 1 to 8 results, and takes one operand.");
  }
  Rendezvous::Results handed;
  handed.count = static_cast<int32_t>(results.size());
  for (int32_t result = 0; result < handed.count; ++result) {
    const auto buffer = results.get<ffi::AnyBuffer>(result);
    if (!buffer) return refuse("rendezvous: a result can't be read.");
    handed.from[result] = buffer->untyped_data();
    handed.bytes[result] = static_cast<int64_t>(buffer->size_bytes());
  }
  auto into = next.get<ffi::AnyBuffer>(0);
  if (!into) return refuse("rendezvous: the operand can't be written to.");
  return said(found->ask(last, handed, number, (*into)->untyped_data(), static_cast<int64_t>((*into)->size_bytes())));
}

constexpr int32_t kNonsense = -4;

}  // namespace
}  // namespace fusedllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedllm_ask, fusedllm::ask,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("place")
                                  .Attr<int64_t>("last")
                                  .Attr<int64_t>("number"));

int32_t fusedllm_rendezvous_open() {
  for (int32_t place = 0; place < fusedllm::kPlaces; ++place) {
    if (!fusedllm::places()[place].used.exchange(true, std::memory_order_acq_rel)) return place;
  }
  return -1;
}

void fusedllm_rendezvous_close(int32_t place) {
  if (fusedllm_rendezvous_end(place) == fusedllm::Rendezvous::kDone) {
    fusedllm::places()[place].used.store(false, std::memory_order_release);
  }
}

int32_t fusedllm_rendezvous_begin(int32_t place) {
  fusedllm::Rendezvous* const found = fusedllm::meeting(place);
  if (found == nullptr) return fusedllm::kNonsense;
  found->begin();
  return fusedllm::Rendezvous::kDone;
}

int32_t fusedllm_rendezvous_end(int32_t place) {
  fusedllm::Rendezvous* const found = fusedllm::meeting(place);
  if (found == nullptr) return fusedllm::kNonsense;
  found->end();
  return fusedllm::Rendezvous::kDone;
}

int32_t fusedllm_rendezvous_exchange(int32_t place, int64_t number, const void* sent, int64_t sent_bytes,
                                     int32_t results, void* const* into, const int64_t* bytes, int64_t microseconds) {
  fusedllm::Rendezvous* const found = fusedllm::meeting(place);
  if (found == nullptr || number < 0 || sent_bytes < 0 || results < 1 ||
      results > fusedllm::Rendezvous::kMostResults) {
    return fusedllm::kNonsense;
  }
  fusedllm::Rendezvous::Message message;
  message.number = number;
  message.sent = sent;
  message.sent_bytes = sent_bytes;
  message.results = results;
  std::copy(into, into + results, message.into);
  std::copy(bytes, bytes + results, message.bytes);
  const auto outcome = found->post(message);
  return outcome == fusedllm::Rendezvous::kDone ? fusedllm_rendezvous_wait(place, microseconds) : outcome;
}

int32_t fusedllm_rendezvous_wait(int32_t place, int64_t microseconds) {
  fusedllm::Rendezvous* const found = fusedllm::meeting(place);
  return found == nullptr ? fusedllm::kNonsense : found->wait(std::chrono::microseconds(microseconds));
}
