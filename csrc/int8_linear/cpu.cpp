// vitzoo_native::int8_linear_fwd on the CPU. kernels/int8_linear/cpu.py allocates the output and checks
// shapes.

#include <memory>
#include <new>
#include <optional>

#include "../common/checks.h"
#include "../common/isa.h"
#include "cpu_args.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kShares = 256;  // that threads divide the packing by

struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<void, Freed>;

Buffer allocate(int64_t bytes) { return Buffer(::operator new(size_t(bytes), std::align_val_t(64))); }

CodeKind code_kind_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return CodeKind::f32;
    case ScalarType::BFloat16:
      return CodeKind::bf16;
    case ScalarType::Half:
      return CodeKind::f16;
    case ScalarType::Char:
      return CodeKind::s8;
    case ScalarType::Byte:
      return CodeKind::u8;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype that the CPU kernels do not take");
  }
  return CodeKind::f32;
}

const float* floats(const Optional& x, const char* name, int64_t numel) {
  return static_cast<const float*>(pointer_of(x, name, numel, false));
}

bool is_code(CodeKind kind) { return kind == CodeKind::s8 || kind == CodeKind::u8; }

// `signed_x`: codes of x are s8 rather than u8, likewise `out`'s by its dtype.
void int8_linear_fwd_cpu(Tensor x, Tensor weight, Tensor weight_scale, Optional bias, Optional x_scale,
                         int64_t x_zero, bool signed_x, int64_t activation, double out_scale,
                         int64_t out_zero, Tensor out) {
  Int8LinearArgs k{};
  k.x = x.data_ptr();
  k.x_kind = code_kind_of(x, "x");
  if (x.dim() == 3) {
    STD_TORCH_CHECK(x.is_cpu() && k.x_kind == CodeKind::f32 && x.stride(1) == 1,
                    "x must be (B, L, K) on the CPU, float32, with rows side by side");
    k.side_by_side = x.size(1);
    k.x_step = x.stride(2);
  } else {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                    "x must be (M, K) on the CPU with contiguous rows");
  }
  k.rows = x.size(0) * (x.dim() == 3 ? x.size(1) : 1);
  k.depth = x.size(-1);
  k.x_stride = x.stride(0);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() &&
                      weight.scalar_type() == ScalarType::Char && weight.size(1) == k.depth,
                  "weight must be a contiguous int8 (N, K) on the CPU");
  k.columns = weight.size(0);
  k.weight = static_cast<const int8_t*>(weight.data_ptr());
  k.weight_scale = floats(weight_scale, "weight_scale", k.columns);
  k.bias = floats(bias, "bias", k.columns);
  k.scale_a_row = x_scale.has_value() && x_scale->numel() != 1;
  k.x_scale = floats(x_scale, "x_scale", k.scale_a_row ? k.rows : 1);
  STD_TORCH_CHECK(k.x_scale != nullptr || !is_code(k.x_kind), "codes need an x_scale");
  k.x_zero = int32_t(x_zero);
  k.x_low = signed_x ? -128 : 0;
  k.x_high = signed_x ? 127 : 255;
  STD_TORCH_CHECK(x_zero >= k.x_low && x_zero <= k.x_high, "x_zero_point is out of range");
  STD_TORCH_CHECK(!is_code(k.x_kind) || (k.x_kind == CodeKind::s8) == signed_x, "x has the other sign");
  STD_TORCH_CHECK(k.rows > 0 && k.columns > 0 && k.depth > 0 && k.depth <= 65536, "sizes out of range");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "unknown activation");
  k.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK(out.is_cpu() && out.is_contiguous() && out.numel() == k.rows * k.columns,
                  "out must be a contiguous (M, N) on the CPU");
  k.out = out.data_ptr();
  k.out_kind = code_kind_of(out, "out");
  k.out_scale = float(out_scale);
  k.out_low = k.out_kind == CodeKind::s8 ? -128 : 0;
  k.out_high = k.out_kind == CodeKind::s8 ? 127 : 255;
  k.out_zero = int32_t(out_zero);
  STD_TORCH_CHECK(!is_code(k.out_kind) || (out_zero >= k.out_low && out_zero <= k.out_high),
                  "out_zero_point is out of range");

  const Int8LinearKernels& kernels = select(int8_linear_baseline, int8_linear_avx2, int8_linear_avx2_vnni,
                                            int8_linear_avx512, int8_linear_avx512_vnni);
  const int64_t padded = (k.depth + kernels.step - 1) / kernels.step * kernels.step;
  const int64_t panels = (k.columns + kernels.panel_columns - 1) / kernels.panel_columns;
  const int64_t columns = panels * kernels.panel_columns;
  const bool packed = k.x_kind == CodeKind::u8 && kernels.code_bytes == 1 && k.depth == padded;
  const Buffer packed_x = allocate(packed ? 0 : k.rows * padded * kernels.code_bytes);
  const Buffer packed_weight = allocate(columns * padded * kernels.code_bytes);
  const Buffer sums = allocate(columns * int64_t(sizeof(int32_t)));
  const Buffer scales = allocate(k.rows * int64_t(sizeof(float)));
  k.packed_x = packed ? nullptr : packed_x.get();
  k.codes = packed ? k.x : packed_x.get();
  k.codes_stride = packed ? k.x_stride : padded;
  k.packed_weight = packed_weight.get();
  k.weight_sums = static_cast<int32_t*>(sums.get());
  k.row_scale = static_cast<float*>(scales.get());
  // Both packings in one region, each thread its share of either: waking the threads once more costs as much
  // as packing a small weight.
  torch::stable::parallel_for(0, kShares, 1, [&](int64_t begin, int64_t end) {
    kernels.pack_weight(k, panels * begin / kShares, panels * end / kShares);
    kernels.pack_x(k, k.rows * begin / kShares, k.rows * end / kShares);
  });
  torch::stable::parallel_for(0, panels * ((k.rows + kRowBlock - 1) / kRowBlock), 1,
                              [&](int64_t begin, int64_t end) { kernels.multiply(k, begin, end); });
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "int8_linear_fwd(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? x_scale, int "
      "x_zero, bool signed_x, int activation, float out_scale, int out_zero, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("int8_linear_fwd", TORCH_BOX(&vitzoo::int8_linear_fwd_cpu));
}
