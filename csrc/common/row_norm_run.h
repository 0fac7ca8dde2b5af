// From tensors to the kernels of row_norm.h.
#pragma once

#include <memory>
#include <new>
#include <optional>

#include "checks.h"
#include "isa.h"
#include "row_norm.h"

namespace vitzoo {

// A contiguous (rows, channels) tensor, double exactly if `wide`.
inline RowsOf rows_of(const std::optional<Tensor>& x, const char* name, const RowNormArgs& k, bool wide) {
  if (!x.has_value()) {
    return RowsOf{};
  }
  STD_TORCH_CHECK(x->is_cpu() && x->is_contiguous(), name, " is not a contiguous tensor on the CPU");
  STD_TORCH_CHECK(x->numel() == k.rows * k.channels, name, " has ", x->numel(), " elements instead of ",
                  k.rows * k.channels);
  const RowsOf rows{x->data_ptr(), kind_of(*x, name)};
  STD_TORCH_CHECK((rows.kind == Kind::f64) == wide, name, " must be float64 exactly when x is");
  return rows;
}

inline RowNormArgs row_norm_args(const Tensor& x, double eps, bool center, bool gate_first) {
  RowNormArgs k{};
  STD_TORCH_CHECK(x.dim() == 2, "x must be (rows, channels)");
  k.rows = x.size(0);
  k.channels = x.size(1);
  k.eps = eps;
  k.center = center;
  k.gate_first = gate_first;
  k.x = rows_of(x, "x", k, x.scalar_type() == ScalarType::Double);
  return k;
}

inline void run_row_norm(const RowNormArgs& k, bool backward) {
  const RowNormKernels& kernels = select(row_norm_baseline, row_norm_avx2, row_norm_avx512);
  const bool wide = k.x.kind == Kind::f64;
  const RowNormPass pass = backward ? (wide ? kernels.backward_f64 : kernels.backward_f32)
                                    : (wide ? kernels.forward_f64 : kernels.forward_f32);
  const int64_t items = backward ? (k.rows + k.part_rows - 1) / k.part_rows : k.rows;
  torch::stable::parallel_for(0, items, backward ? 1 : 8, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[row_norm_scratch(k.channels)]);
    pass(k, begin, end, scratch.get());
  });
}

}  // namespace vitzoo
