// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Tensors are contiguous; x, weight, bias, out, dout and dx have the kind `kind`, dweight and dbias the
// compute type T, float or, where `kind` is f64, double.
struct TvConv2dArgs {
  int64_t batch, channels, height, width;  // of x
  int64_t size, stride;                    // of the kernel, a side
  int64_t out_height, out_width;
  int64_t block_rows, blocks;  // output rows of a work item, and work items a channel (forward, dweight)
  Kind kind;
  const void *x, *weight;  // (batch, channels, height, width), (channels, size^2, out_height, out_width)
  const void* bias;        // (channels, out_height, out_width), or null
  void* out;               // (batch, channels, out_height, out_width)
  const void* dout;
  void *dx, *dweight, *dbias;  // dbias may be null
};

using TvConv2dPass = void (*)(const TvConv2dArgs& args, int64_t begin, int64_t end, void* scratch);

struct TvConv2dPasses {
  TvConv2dPass forward, backward_weight;  // items: channels * blocks
  TvConv2dPass backward_input;            // items: channels * groups of kInputImages images
};
struct TvConv2dKernels {
  TvConv2dPasses f32, f64, bf16, f16;
};

extern const TvConv2dKernels tv_conv2d_baseline, tv_conv2d_avx2, tv_conv2d_avx512;

constexpr int64_t kImages = 16;      // whose rows are kept at once, so that a weight is read once for all
constexpr int64_t kInputImages = 8;  // likewise, whole images

// Elements of a padded row of x. It is split into `stride` phases: column s i + f of the padded row is
// element i of phase f, so that neighbouring outputs read neighbouring elements. A vector is to spare.
inline int64_t tv_conv2d_phase(const TvConv2dArgs& k) {
  const int64_t columns = k.out_width + (k.size - 1) / k.stride + 1;
  const int64_t whole = (k.width + k.size) / k.stride + 1;
  return (columns > whole ? columns : whole) + 16;
}
inline int64_t tv_conv2d_rows(const TvConv2dArgs& k, int64_t out_rows) {
  return (out_rows - 1) * k.stride + k.size;
}
// Rows of a whole padded image, also those that no window reaches.
inline int64_t tv_conv2d_image_rows(const TvConv2dArgs& k) {
  const int64_t reached = tv_conv2d_rows(k, k.out_height), all = k.height + k.size;
  return reached > all ? reached : all;
}

// Bytes a thread needs.
inline size_t tv_conv2d_scratch(const TvConv2dArgs& k, bool whole_images, size_t element) {
  const int64_t rows =
      whole_images ? kInputImages * tv_conv2d_image_rows(k) : kImages * tv_conv2d_rows(k, k.block_rows);
  return size_t(rows * k.stride * tv_conv2d_phase(k)) * element + size_t(kImages) * 64 +
         size_t(k.size * k.size) * sizeof(int64_t);
}

}  // namespace vitzoo
