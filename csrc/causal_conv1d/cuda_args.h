// What the launchers hand to the CUDA kernels of the causal convolution; plain data.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

struct CausalConv1dCudaArgs {
  int64_t batch, dim, seqlen, width;
  int64_t segment;   // tokens of a block
  int64_t segments;  // of the sequence
  bool silu;
  bool reverse;         // the walk goes from the last token to the first
  View x, out;          // (batch, dim, seqlen)
  View initial, final;  // (batch, dim, width - 1), in the order of the walk; initial may be absent
  const float* weight;  // (dim, width)
  const float* bias;    // (dim), or null

  // The rest belongs to the backward pass.
  View dout, dx;          // (batch, dim, seqlen)
  View dfinal, dinitial;  // (batch, dim, width - 1), may be absent
  float* dweight;         // (batch, segments, dim, width), still to be added up
  float* dbias;           // (batch, segments, dim), or null
};

}  // namespace vitzoo
