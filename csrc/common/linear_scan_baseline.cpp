#include <cstddef>
#include <cstdint>

#include "linear_scan.h"

// clang-format off: the order matters
#include "linear_scan_kernel.h"
// clang-format on

namespace vitzoo {
const LinearScanKernels linear_scan_baseline = kKernels;
}
