// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// A map (batch, height, width, channels) with contiguous channels; strides in elements.
struct MapView {
  void* data = nullptr;
  int64_t batch = 0, row = 0, column = 0;
  Kind kind = Kind::f32;
};

// T is float, or double where qkv is double. M = window_h * window_w.
struct WindowAttentionArgs {
  int64_t batch, height, width, heads, head_dim;
  int64_t window_h, window_w, shift_h, shift_w;
  bool roll_first;  // shift the map before it is padded
  double scale;
  MapView qkv, out;
  const void* pad;   // (3 * channels) of the kind of qkv, or null: zeros
  const void* bias;  // T (heads, M queries, M keys), or null
  void* bias_t;      // T (heads, M keys, bias_ld): the bias transposed, in units of log 2; or null
  int64_t bias_ld;   // M rounded up to the widest vector

  // The rest belongs to the backward pass.
  MapView dout, dqkv;
  int64_t parts;  // the windows of all images fall into so many parts, a work item for each part and head
  void* dbias;    // T (parts, heads, M, bias_ld), or null
  void* dpad;     // T (parts, 3 * channels), or null
};

// One pass over work items [begin, end): heads to transpose the bias, images and windows forward, parts and
// heads backward.
using WindowAttentionPass = void (*)(const WindowAttentionArgs& args, int64_t begin, int64_t end,
                                     void* scratch);

struct WindowAttentionKernels {
  WindowAttentionPass bias_f32, bias_f64, forward_f32, forward_f64, backward_f32, backward_f64;
};

extern const WindowAttentionKernels window_attention_baseline, window_attention_avx2, window_attention_avx512;

inline int64_t window_attention_windows(const WindowAttentionArgs& k) {
  return ((k.height + k.window_h - 1) / k.window_h) * ((k.width + k.window_w - 1) / k.window_w);
}

// Bytes a thread needs.
size_t window_attention_scratch(const WindowAttentionArgs& args, bool backward);

}  // namespace vitzoo
