// Which instruction set the CPU kernels use.
#pragma once

namespace vitzoo {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set of this CPU, or what VITZOO_CPU_ISA names (baseline, avx2 or avx512); throws
// std::runtime_error if the name is unknown or the CPU lacks it. Decided at each call, so that a wrong value
// is an error of the call.
Isa cpu_isa();

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

}  // namespace vitzoo
