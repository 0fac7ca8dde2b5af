#include <cstddef>
#include <cstdint>

#include "linear_scan.h"

// clang-format off: the order matters
#include "isa_avx2.h"
#include "linear_scan_kernel.h"
#include "isa_end.h"
// clang-format on

namespace vitzoo {
const LinearScanKernels linear_scan_avx2 = kKernels;
}
