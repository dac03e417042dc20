#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "pool.h"

namespace fusedllm {
namespace {

const Kernels* best() {
  for (const char* name : {"avx512bf16", "avx512", "avx2"}) {
    if (const Kernels* found = kernels_named(name)) return found;
  }
  return portable_kernels();
}

std::atomic<const Kernels*>& chosen() {
  // An environment variable that names none is reported by the Python side, which can speak to the user.
  static std::atomic<const Kernels*> kernels = [] {
    const char* name = std::getenv("FUSEDLLM_CPU_ISA");
    const Kernels* named = name == nullptr ? nullptr : kernels_named(name);
    return named == nullptr ? best() : named;
  }();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const Kernels* kernels_named(const char* name) {
  if (std::strcmp(name, "portable") == 0) return portable_kernels();
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2_kernels();
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    if (std::strcmp(name, "avx512") == 0) return avx512_kernels();
    if (std::strcmp(name, "avx512bf16") == 0 && __builtin_cpu_supports("avx512bf16")) return avx512bf16_kernels();
  }
#endif
  return nullptr;
}

}  // namespace fusedllm

const char* fusedllm_isa() { return fusedllm::kernels().name; }

int fusedllm_choose_isa(const char* name) {
  const fusedllm::Kernels* found = fusedllm::kernels_named(name);
  if (found == nullptr) return 0;
  fusedllm::chosen().store(found);
  return 1;
}

int fusedllm_has_isa(const char* name) { return fusedllm::kernels_named(name) != nullptr; }

int fusedllm_interface() { return 10; }

int fusedllm_threads() { return fusedllm::Pool::instance().threads(); }

void fusedllm_set_threads(int count) { fusedllm::Pool::instance().set_threads(count); }
