// Which instruction set's kernels run.
#pragma once

#include "kernels.h"

namespace diveq {

// The best that runs here, or the one that DIVEQ_CPU_ISA names.
const Kernels& kernels();

// Its place in the list portable, avx2, avx512, amx, avx512vnni.
int64_t instruction_set();

}  // namespace diveq
