// A strided (batch, channel, token) tensor as the kernels see it; plain data, shared by translation units
// compiled for different instruction sets.
#pragma once

#include <cstdint>

namespace vitzoo {

enum class Kind : int { f32, f64, bf16, f16 };

struct View {
  void* data = nullptr;                       // null: the tensor is absent
  int64_t batch = 0, channel = 0, token = 0;  // strides in elements
  Kind kind = Kind::f32;
};

}  // namespace vitzoo
