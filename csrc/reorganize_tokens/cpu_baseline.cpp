#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "cpu_kernel.h"
// clang-format on

namespace vitzoo {
const ReorganizeKernels reorganize_tokens_baseline = kKernels;
}
