// Which instruction sets this processor has, and which of the compiled variants runs.
#pragma once

#include "variant.h"

namespace fusedllm {

// The kernels that run: the best variant of this processor, or what FUSEDLLM_CPU_ISA or `choose_isa` named.
const Kernels& kernels();

// The kernels of the variant of this name, or nullptr where it was not compiled or the processor can't run it.
const Kernels* kernels_named(const char* name);

}  // namespace fusedllm

extern "C" {
// The name of the variant that runs.
const char* fusedllm_isa();
// Makes the variant of this name run from now on; 0 where there is none of that name or this processor can't run it.
int fusedllm_choose_isa(const char* name);
// Whether the variant of this name could run here.
int fusedllm_has_isa(const char* name);
// The number that `kernels/native.py` calls INTERFACE.
int fusedllm_interface();
// Threads of the pool.
int fusedllm_threads();
void fusedllm_set_threads(int count);
}
