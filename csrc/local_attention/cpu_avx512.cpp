#include <cstddef>
#include <cstdint>

#include "cpu_args.h"

// clang-format off: the order matters
#include "../common/isa_avx512.h"
#include "cpu_kernel.h"
#include "../common/isa_end.h"
// clang-format on

namespace vitzoo {
const LocalAttentionKernels local_attention_avx512 = kKernels;
}
