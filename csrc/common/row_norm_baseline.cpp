#include <cstddef>
#include <cstdint>

#include "row_norm.h"

// clang-format off: the order matters
#include "row_norm_kernel.h"
// clang-format on

namespace vitzoo {
const RowNormKernels row_norm_baseline = kRowNormKernels;
}
