#include <cstddef>
#include <cstdint>

#include "attention_args.h"

// clang-format off: the order matters
#include "isa_avx2.h"
#include "attention_kernel.h"
#include "isa_end.h"
// clang-format on

namespace vitzoo {
const AttentionKernels attention_avx2 = kKernels;
}
