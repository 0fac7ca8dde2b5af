// Norms of rows, with what stands around them: what cpu.cpp of add_norm and of rms_norm_gated hand to the
// kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "view.h"

namespace vitzoo {

// A contiguous (rows, channels) tensor of any float type; null: absent.
struct RowsOf {
  void* data = nullptr;
  Kind kind = Kind::f32;
};

// r = x, x + residual, or x silu(z) where the gate comes first; n = (r - mean) rstd weight + bias, with mean
// 0 unless `center`; out = n, or n silu(z) where the gate comes last. Tensors by pointer are of the compute
// type T: float, or double where x is double.
struct RowNormArgs {
  int64_t rows, channels;
  double eps;
  bool center, gate_first;
  RowsOf x, residual, z, out;
  const void* weight;  // (channels)
  const void* bias;    // (channels), or null
  void* r;             // (rows, channels) or null: written forward; read backward in place of x and residual

  // The rest belongs to the backward pass.
  int64_t part_rows;  // rows of a work item
  RowsOf dout, dx, dresidual, dz;
  const void* dr;         // (rows, channels), or null: gradient of r from elsewhere
  void *dweight, *dbias;  // (parts, channels), sums over the rows of a part; dbias may be null
};

// Forward over rows [begin, end); backward over parts [begin, end).
using RowNormPass = void (*)(const RowNormArgs& args, int64_t begin, int64_t end, void* scratch);

struct RowNormKernels {
  RowNormPass forward_f32, forward_f64, backward_f32, backward_f64;
};

extern const RowNormKernels row_norm_baseline, row_norm_avx2, row_norm_avx512;

// Bytes a thread needs: five rows of doubles.
inline size_t row_norm_scratch(int64_t channels) { return 8 * 5 * size_t(channels); }

}  // namespace vitzoo
