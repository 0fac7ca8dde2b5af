// Linear attention with one decay a head and token (ssd_scan, retention): what linear_scan.cpp hands to the
// kernels of each instruction set; plain data.
//
//   S_t = exp(s_t rate) S_{t-1} + k_t (s_t v_t)^T;  y_t = scale S_t^T q_t + d v_t;  out_t = y_t silu(z_t)
//
// with s_t = softplus(dt_t + dt_bias), or 1 without dt. S is (dk, dv).
#pragma once

#include <cstddef>
#include <cstdint>

#include "view.h"

namespace vitzoo {

constexpr int64_t kChunk = 64;  // tokens; a multiple of every vector width

// Sizes padded for the widest vectors, 16 floats or 8 doubles.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// Tensors by pointer are contiguous and of the compute type T: float, or double where v is double. A view's
// channel is the head (the group, for q and k); the last dimension of q, k, v, z, out has stride 1.
struct LinearScanArgs {
  int64_t batch, seqlen, heads, groups, dk, dv;
  int64_t chunks;
  int64_t part_heads;  // heads of a group that one work item takes, one after the other; q k^T is formed once
  int64_t parts;       // work items a group
  double scale;
  bool dt_softplus, has_initial, d_by_channel;
  View q, k;            // (batch, seqlen, groups, dk)
  View v, z, out;       // (batch, seqlen, heads, dv)
  View dt;              // (batch, seqlen, heads)
  const double* rate;   // (heads)
  const void* dt_bias;  // (heads), or null
  const void* d;        // (heads), or (heads, dv), or null

  // (slots, batch, heads, padded dk, padded dv) and (slots, batch, heads): what a chunk adds to the state,
  // then the state before it, and the decay over it; in the backward pass also the gradient of the state
  // after it.
  void* states;
  void* state_decays;
  void* gradients;
  void* gradient_decays;

  // The rest belongs to the backward pass.
  View dout, dv_out, dz;  // (batch, seqlen, heads, dv)
  int64_t first, span;    // tokens [first, first + span) of dq and dk_out
  void* dq;               // (batch, parts, span, groups, dk): sums over the heads of each part
  void* dk_out;           // likewise
  void* ddt;              // (batch, seqlen, heads), or null
  void* drate;            // (batch, chunks, heads)
  void* dd;               // (batch, chunks, heads, dv), or null
};

inline int64_t state_size(const LinearScanArgs& k) { return padded(k.dk) * padded(k.dv); }

// One chunk of one work item of batch * groups * parts, and where in `states` and `gradients` its matrices
// are.
struct ChunkOf {
  int64_t item, chunk, state_slot, gradient_slot;
};
using LinearScanStep = void (*)(const LinearScanArgs& args, ChunkOf where, void* scratch);
// For one head of one image: turns what `count` chunks add, in slots 0 to count - 1, into the state before
// each (after each, from the last to the first, where `reverse`), starting from and ending in `carry`.
using LinearScanPass = void (*)(const LinearScanArgs& args, int64_t head, int64_t count, bool reverse,
                                void* carry);

struct LinearScanSet {
  LinearScanStep output;         // out, from the state before the chunk
  LinearScanStep add_state;      // what the chunk adds to the state, and its decay
  LinearScanStep next_state;     // the state after the chunk, in place of the one before
  LinearScanStep add_gradient;   // what the chunk adds to the gradient of the state before it
  LinearScanStep next_gradient;  // that gradient, in place of the one of the state after it
  LinearScanStep backward;       // every gradient, from the state before and the gradient of the one after
  LinearScanPass pass_states;
};

struct LinearScanKernels {
  LinearScanSet f32, f64;
};

extern const LinearScanKernels linear_scan_baseline, linear_scan_avx2, linear_scan_avx512;

// Elements of scratch memory that a thread needs.
inline size_t linear_scan_scratch(int64_t dk, int64_t dv) {
  const size_t c = size_t(kChunk), wide_k = size_t(padded(dk)), wide_v = size_t(padded(dv));
  return c * (5 * wide_k + 6 * wide_v) + 3 * c * c + 2 * wide_k * wide_v + 16 * c;
}

}  // namespace vitzoo
