#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "../common/isa_avx512.h"
#include "cpu_passes.h"
#include "../common/isa_end.h"
// clang-format on

namespace vitzoo {
const SelectiveScanKernels selective_scan_avx512 = kKernels;
}
