// Helpers between the stable ABI's tensors and the kernels' plain data.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "view.h"

namespace vitzoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Kind kind_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Kind::f32;
    case ScalarType::Double:
      return Kind::f64;
    case ScalarType::BFloat16:
      return Kind::bf16;
    case ScalarType::Half:
      return Kind::f16;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype that the kernels do not take");
  }
  return Kind::f32;
}

// A (batch, channel, token) tensor of double if `wide`, of a narrower float type if not.
inline View view_of(const Tensor& x, const char* name, int64_t batch, int64_t dim, int64_t seqlen,
                    bool wide) {
  STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == dim && x.size(2) == seqlen, name,
                  " does not have the shape (", batch, ", ", dim, ", ", seqlen, ")");
  View view;
  view.kind = kind_of(x, name);
  STD_TORCH_CHECK((view.kind == Kind::f64) == wide, name, " must be float64 exactly when u is");
  view.data = x.data_ptr();
  view.batch = x.stride(0);
  view.channel = x.stride(1);
  view.token = seqlen > 1 ? x.stride(2) : 1;
  return view;
}

inline View view_of(const std::optional<Tensor>& x, const char* name, int64_t batch, int64_t dim,
                    int64_t seqlen, bool wide) {
  return x.has_value() ? view_of(*x, name, batch, dim, seqlen, wide) : View{};
}

// The pointer of a contiguous tensor of `numel` elements, double if `wide` and float if not.
inline void* pointer_of(const Tensor& x, const char* name, int64_t numel, bool wide) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, " is not a contiguous tensor on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name, " is not ",
                  wide ? "float64" : "float32");
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements instead of ", numel);
  return x.data_ptr();
}

inline void* pointer_of(const std::optional<Tensor>& x, const char* name, int64_t numel, bool wide) {
  return x.has_value() ? pointer_of(*x, name, numel, wide) : nullptr;
}

}  // namespace vitzoo
