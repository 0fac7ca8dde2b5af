// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Tensors are contiguous. T is the compute type: float, or double where x is double.
struct ReorganizeArgs {
  int64_t batch, length, channels;  // of x; the class token is row 0
  int64_t keep;
  bool fuse;             // and something was dropped
  Kind kind;             // of x, tokens and their gradients
  const void* x;         // (batch, length, channels)
  const int64_t* place;  // (batch, length - 1): which kept token each is, -1 if dropped
  const void* scores;    // (batch, length - 1), T
  void* tokens;          // (batch, 1 + keep + fuse, channels); read backward as their gradient
  void* dx;              // backward: as x
  void* dscores;         // backward: (batch, length - 1), T
};

// One pass over images [begin, end); scratch holds `channels` of T.
using ReorganizePass = void (*)(const ReorganizeArgs& args, int64_t begin, int64_t end, void* scratch);

struct ReorganizeKernels {
  ReorganizePass forward_f32, forward_f64, backward_f32, backward_f64;
};

extern const ReorganizeKernels reorganize_tokens_baseline, reorganize_tokens_avx2, reorganize_tokens_avx512;

}  // namespace vitzoo
