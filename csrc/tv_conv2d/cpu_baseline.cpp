#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "cpu_kernel.h"
// clang-format on

namespace vitzoo {
const TvConv2dKernels tv_conv2d_baseline = kKernels;
}
