// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vitzoo {

enum class CodeKind : int { f32, bf16, f16, s8, u8 };
enum class Activation : int { none, gelu, relu };

struct Int8LinearArgs {
  int64_t rows, columns, depth;  // M, N, K
  const void* x;                 // (M, K), rows contiguous
  int64_t x_stride;              // elements between rows
  // Where > 0, x is (M / side_by_side, side_by_side, K), float: a batch's rows lie side by side, x_step
  // elements are between the values of one, and x_stride between batches.
  int64_t side_by_side, x_step;
  CodeKind x_kind, out_kind;
  const int8_t* weight;       // (N, K), contiguous
  const float* weight_scale;  // (N)
  const float* bias;          // (N), or null
  const float* x_scale;       // one, or one a row; null: chosen for each row from its largest magnitude
  bool scale_a_row;
  int32_t x_zero, x_low, x_high;  // zero point and range of the codes of x
  Activation activation;
  float out_scale;  // of codes
  int32_t out_zero, out_low, out_high;
  void* out;  // (M, N), contiguous

  // Filled by the packing passes; sizes in Int8LinearKernels.
  void* packed_x;  // null where x already is what it would be
  void* packed_weight;
  int32_t* weight_sums;  // one a column, padded to whole panels
  float* row_scale;      // (M)

  const void* codes;  // packed_x, or x in its place
  int64_t codes_stride;
};

constexpr int64_t kTileRows = 6;
constexpr int64_t kRowBlock = 16 * kTileRows;  // rows of one work item
constexpr int64_t kMaxColumns = 64;            // of a panel

// A pass over work items [begin, end).
using Int8LinearPass = void (*)(const Int8LinearArgs& args, int64_t begin, int64_t end);

struct Int8LinearKernels {
  int64_t panel_columns;       // columns of the weight (rows of its transpose) packed together
  int64_t step;                // codes along K that one lane multiplies and adds at once; K is padded to it
  int64_t code_bytes;          // of a packed code: 1 with the 8-bit dot product, 2 without
  Int8LinearPass pack_x;       // items: rows
  Int8LinearPass pack_weight;  // items: panels
  Int8LinearPass multiply;     // items: panel * row blocks + row block
};

extern const Int8LinearKernels int8_linear_baseline, int8_linear_avx2, int8_linear_avx2_vnni,
    int8_linear_avx512, int8_linear_avx512_vnni;

}  // namespace vitzoo
