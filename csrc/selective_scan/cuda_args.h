// What the launchers hand to the CUDA kernels of the selective scan; plain data.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Views are (batch, dim, seqlen), contiguous along the tokens; tensors by pointer are contiguous float32.
struct SelectiveScanCudaArgs {
  int64_t batch, dim, seqlen, dstate;
  int64_t row;             // tokens a row of b, c, db, dc holds: seqlen rounded up to whole packs
  int64_t groups;          // of channels that share B and C; 1 where both are constant
  int64_t group_channels;  // dim / groups
  bool delta_softplus;
  bool constant_b, constant_c;
  View u, delta, z, out;
  const float* a;  // (dim, dstate)
  const float* b;  // (batch, groups, dstate, row), zero beyond seqlen, or (dim, dstate) where constant
  const float* c;  // likewise
  const float* d;  // (dim), or null
  const float* delta_bias;  // (dim), or null
  float* last_state;        // (batch, dim, dstate)

  // The rest belongs to the backward pass.
  int64_t parts;          // blocks a group of channels is divided among
  int64_t part_channels;  // channels of a block, one after the other; the last part may be shorter
  int64_t chunks;         // pieces of the sequence, each as long as a block takes at once
  View dout, du, ddelta, dz;
  const float* dlast_state;  // (batch, dim, dstate), or null
  float* starts;       // (batch, dim, chunks, dstate): scratch, the state before each chunk; null for one
  float* da;           // (batch, dim, dstate): sums over tokens, still to be added up over the batch
  float* db;           // (batch, parts, groups, dstate, row), or (batch, dim, dstate) where constant
  float* dc;           // likewise
  float* dd;           // (batch, dim), or null
  float* ddelta_bias;  // (batch, dim), or null
};

}  // namespace vitzoo
