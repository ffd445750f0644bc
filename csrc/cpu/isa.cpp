#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diveq {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Whether there is a matrix unit for bf16, and conversion to it, and the kernel lets this process use the unit (its
// registers are large).
bool may_use_amx() {
  static const bool may = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
}
#endif

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__linux__)
  if (&kernels == &kernels_amx) return runs_here(kernels_avx512) && may_use_amx();
#endif
  if (&kernels == &kernels_avx512vnni) return runs_here(kernels_avx512) && __builtin_cpu_supports("avx512vnni");
  if (&kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &kernels_portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const known[] = {
#if defined(__x86_64__)
#if defined(__linux__)
      &kernels_amx,
#endif
      &kernels_avx512vnni, &kernels_avx512, &kernels_avx2,
#endif
      &kernels_portable};
  const char* asked = std::getenv("DIVEQ_CPU_ISA");
  std::string names;
  for (const Kernels* candidate : known) {
    if (!runs_here(*candidate)) continue;
    if (!asked || !*asked || !std::strcmp(asked, candidate->name)) return *candidate;
    names += names.empty() ? candidate->name : std::string(", ") + candidate->name;
  }
  throw std::runtime_error("DIVEQ_CPU_ISA must name an instruction set that this processor has (" + names +
                           "), got '" + asked + "'");
}

int64_t instruction_set() {
  const char* const names[] = {"portable", "avx2", "avx512", "amx", "avx512vnni"};
  return std::find_if(names, names + 5, [](const char* name) { return !std::strcmp(name, kernels().name); }) - names;
}

}  // namespace diveq
