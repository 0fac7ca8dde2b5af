#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vitzoo {
namespace {

struct Choice {
  Isa isa;
  bool vnni;
};

struct Available {
  Isa isa = Isa::baseline;
  bool avx2_vnni = false, avx512_vnni = false;
};

Available available_here() {
  Available here;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return here;
  }
  here.isa = Isa::avx2;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  here.avx2_vnni = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4)) != 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    here.isa = Isa::avx512;
    here.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  }
#endif
  return here;
}

struct Named {
  const char* name;
  Choice choice;
};

constexpr Named kNames[] = {{"baseline", {Isa::baseline, false}},
                            {"avx2", {Isa::avx2, false}},
                            {"avx2_vnni", {Isa::avx2, true}},
                            {"avx512", {Isa::avx512, false}},
                            {"avx512_vnni", {Isa::avx512, true}}};

bool has(const Available& here, Choice choice) {
  const bool vnni = choice.isa == Isa::avx512 ? here.avx512_vnni : here.avx2_vnni;
  return choice.isa <= here.isa && (vnni || !choice.vnni);
}

Choice choose() {
  static const Available here = available_here();
  const char* const wanted = std::getenv("VITZOO_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return {here.isa, here.isa == Isa::avx512 ? here.avx512_vnni : here.avx2_vnni};
  }
  std::string known;
  for (const Named& named : kNames) {
    if (named.name == std::string(wanted)) {
      if (!has(here, named.choice)) {
        throw std::runtime_error(std::string("VITZOO_CPU_ISA is ") + wanted + " but this CPU has only " +
                                 isa_name(here.isa) +
                                 (here.avx2_vnni || here.avx512_vnni ? " with VNNI" : " without VNNI"));
      }
      return named.choice;
    }
    known += (known.empty() ? "" : ", ") + std::string(named.name);
  }
  throw std::runtime_error(std::string("VITZOO_CPU_ISA is ") + wanted + ", not one of " + known);
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa cpu_isa() { return choose().isa; }

bool cpu_vnni() { return choose().vnni; }

namespace {

int64_t cpu_isa_number() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_vnni() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vitzoo::cpu_isa_number));
  m.impl("cpu_vnni", TORCH_BOX(&vitzoo::cpu_vnni));
}
