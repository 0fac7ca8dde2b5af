// What the launchers hand to the CUDA kernels of window attention; plain data.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Maps are (batch, height, width, channels), contiguous along the channels: a View's `channel` is the stride
// of a row of the map and its `token` that of a column.
struct WindowAttentionCudaArgs {
  int64_t batch;
  int height, width, heads, head_dim;
  int window_h, window_w, shift_h, shift_w;
  int rows, cols;   // windows of the padded map
  int area;         // tokens of a window
  bool roll_first;  // the map is rolled before it is padded
  float scale;
  int warps_per_item;  // that share one window of one head
  View qkv, out;
  const float* bias;  // (heads, area, area), or null
  const float* pad;   // (3 * heads * head_dim), or null

  // The rest belongs to the backward pass.
  int64_t parts;             // into which the windows of all images are divided
  int64_t windows_per_part;  // taken one after the other; the last part may have fewer
  View dout, dqkv;
  float* dbias;  // (parts, heads, area, area), still to be added up, or null
  float* dpad;   // (parts, 3 * heads * head_dim), or null
};

}  // namespace vitzoo
