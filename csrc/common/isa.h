// Which instruction set the CPU kernels use.
#pragma once

namespace vitzoo {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set of this CPU, or what VITZOO_CPU_ISA names (baseline, avx2, avx2_vnni, avx512 or avx512_vnni);
// throws std::runtime_error if the name is unknown or the CPU lacks it. Decided at each call, so that a wrong
// value is an error of the call.
Isa cpu_isa();

// Whether the 8-bit dot product (vpdpbusd) may be used with vectors of the width of cpu_isa(): the CPU has
// it, and VITZOO_CPU_ISA is unset or names it.
bool cpu_vnni();

const char* isa_name(Isa isa);

// Picks one of three kernels compiled from the same source.
template <class Kernel>
const Kernel& select(const Kernel& baseline, const Kernel& avx2, const Kernel& avx512) {
  switch (cpu_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

// Likewise where the 8-bit dot product has kernels of its own.
template <class Kernel>
const Kernel& select(const Kernel& baseline, const Kernel& avx2, const Kernel& avx2_vnni,
                     const Kernel& avx512, const Kernel& avx512_vnni) {
  return cpu_vnni() ? select(baseline, avx2_vnni, avx512_vnni) : select(baseline, avx2, avx512);
}

}  // namespace vitzoo
