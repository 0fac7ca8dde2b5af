#include <cstddef>
#include <cstdint>

#include "row_norm.h"

// clang-format off: the order matters
#include "isa_avx512.h"
#include "row_norm_kernel.h"
#include "isa_end.h"
// clang-format on

namespace vitzoo {
const RowNormKernels row_norm_avx512 = kRowNormKernels;
}
