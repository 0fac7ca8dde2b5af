#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "../common/isa_avx2.h"
#include "cpu_kernel.h"
#include "../common/isa_end.h"
// clang-format on

namespace vitzoo {
const TvConv2dKernels tv_conv2d_avx2 = kKernels;
}
