// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

struct Planes {  // (batch, channels, height, width) with contiguous images
  void* data = nullptr;
  int64_t batch = 0;  // elements between images
  Kind kind = Kind::f32;
};

struct LocalAttentionArgs {
  int64_t batch, heads, channels;  // channels of a head
  int64_t height, width;
  int64_t kernel_height, kernel_width, dilation;
  double scale;
  int64_t block_rows, blocks;  // rows of a work item, and work items a head
  Planes q, k, v, out;
  // The rest belongs to the backward pass; the maps are (batch, heads, window, height, width) of the compute
  // type, contiguous.
  Planes dout, dq, dk, dv;
  void *weights, *dscores;
};

// A pass over work items [begin, end) of batch * heads * blocks.
using LocalAttentionPass = void (*)(const LocalAttentionArgs& args, int64_t begin, int64_t end,
                                    void* scratch);

// The backward pass first finds dq and the maps, then, from the maps, dk and dv.
struct LocalAttentionPasses {
  LocalAttentionPass forward, backward_maps, backward_windows;
};
struct LocalAttentionKernels {
  LocalAttentionPasses f32, f64;
};

extern const LocalAttentionKernels local_attention_baseline, local_attention_avx2, local_attention_avx512;

// Elements of a channel of a block with its padding and a vector to spare, an odd multiple of a cache line of
// floats so that the channels do not fall on one another.
inline int64_t local_attention_channel(const LocalAttentionArgs& k) {
  const int64_t rows = k.block_rows + k.dilation * (k.kernel_height - 1);
  const int64_t columns = k.width + k.dilation * (k.kernel_width - 1);
  return (rows * columns + 16 + 31) / 32 * 32 + 16;
}

// Bytes a thread needs.
inline size_t local_attention_scratch(const LocalAttentionArgs& k, size_t element) {
  const int64_t window = k.kernel_height * k.kernel_width;
  return size_t((5 * k.channels + 2 * window) * local_attention_channel(k)) * element +
         size_t(window) * (4 * 64 + 2 * sizeof(int64_t));
}

}  // namespace vitzoo
