#include <cstddef>
#include <cstdint>

#include "attention_args.h"

// clang-format off: the order matters
#include "attention_kernel.h"
// clang-format on

namespace vitzoo {
const AttentionKernels attention_baseline = kKernels;
}
