#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitzoo {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa cpu_isa() {
  static const Isa available = best();
  const char* const wanted = std::getenv("VITZOO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return available;
  }
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_name(isa) == std::string(wanted)) {
      if (isa > available) {
        throw std::runtime_error(std::string("VITZOO_CPU_ISA is ") + wanted + " but this CPU has only " +
                                 isa_name(available));
      }
      return isa;
    }
  }
  throw std::runtime_error(std::string("VITZOO_CPU_ISA is ") + wanted +
                           ", not one of baseline, avx2, avx512");
}

namespace {

int64_t cpu_isa_number() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) { m.def("cpu_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vitzoo::cpu_isa_number));
}
