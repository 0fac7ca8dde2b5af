// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

constexpr int64_t kConvChannels = 16;        // channels of a work item, a multiple of every vector width
constexpr int64_t kConvForwardTokens = 256;  // tokens a forward pass keeps in L1 for one row
constexpr int64_t kConvBackwardTokens =
    256;  // tokens a backward pass keeps of one row, or of a vector of channels
constexpr int64_t kConvMaxWidth = 4;

// Tensors by pointer are contiguous and of the compute type T: float, or double where x is double.
struct CausalConv1dArgs {
  int64_t batch, dim, seqlen;
  int64_t width;               // of the convolution
  int64_t tiles;               // of kConvChannels channels
  int64_t parts, part_tokens;  // pieces of the tokens, the last may be shorter
  bool silu, reverse;
  bool columns;                // the channels of x, out, dout and dx lie side by side, not the tokens
  View x, out;                 // (batch, dim, seqlen)
  View initial, final_states;  // (batch, dim, width - 1), initial may be absent
  const void* weight;          // (dim, width)
  const void* bias;            // (dim), or null

  // The rest belongs to the backward pass.
  View dout, dx;  // (batch, dim, seqlen)
  View dinitial;  // (batch, dim, width - 1), or absent
  void* dweight;  // (batch, parts, dim, width): sums over the tokens of a part
  void* dbias;    // (batch, parts, dim), or null
};

// One pass over work items [begin, end) of batch * parts * tiles.
using CausalConv1dPass = void (*)(const CausalConv1dArgs& args, int64_t begin, int64_t end, void* scratch);

struct CausalConv1dKernels {
  CausalConv1dPass forward_f32, forward_f64, backward_f32, backward_f64;
};

extern const CausalConv1dKernels causal_conv1d_baseline, causal_conv1d_avx2, causal_conv1d_avx512;

// Bytes a thread needs, for the widest units: one double forward, where columns need no buffer, one vector
// backward.
constexpr size_t kConvForwardScratch = 8 * 2 * size_t(kConvForwardTokens + 64);
constexpr size_t kConvBackwardScratch = 64 * 3 * size_t(kConvBackwardTokens + 64);

}  // namespace vitzoo
