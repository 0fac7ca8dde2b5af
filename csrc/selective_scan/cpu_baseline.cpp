#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "cpu_passes.h"
// clang-format on

namespace vitzoo {
const SelectiveScanKernels selective_scan_baseline = kKernels;
}
