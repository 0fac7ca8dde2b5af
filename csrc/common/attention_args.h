// Attention of strided rows, which pooled_attention and attention_with_scores share: what attention_cpu.cpp
// hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "view.h"

namespace vitzoo {

// (batch, head, token, head_dim) with contiguous head_dim; strides in elements.
struct HeadsView {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  Kind kind = Kind::f32;
};

// T is float, or double where q is double.
struct AttentionArgs {
  int64_t batch, heads, queries, keys, head_dim;
  double scale;
  int64_t block;  // queries that a thread treats at once, a multiple of every vector width
  int64_t parts;  // of the queries, a work item for each image, head and part
  HeadsView q, k, v, out;
  void* first_rows;  // T (batch, heads, keys): weights of query 0, or null

  // The rest belongs to the backward pass.
  HeadsView dout, dq;
  HeadsView dk, dv;        // (parts * batch, head, token, head_dim)
  const void* dfirst_row;  // T (batch, keys): gradient of the weights of query 0 of every head, or null
};

using AttentionPass = void (*)(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch);

struct AttentionKernels {
  AttentionPass forward_f32, forward_f64, backward_f32, backward_f64;
};

extern const AttentionKernels attention_baseline, attention_avx2, attention_avx512;

}  // namespace vitzoo
