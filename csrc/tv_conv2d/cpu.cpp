// vitzoo_native::tv_conv2d_fwd and tv_conv2d_bwd on the CPU. kernels/tv_conv2d/cpu.py allocates every output.

#include <memory>
#include <new>
#include <optional>

#include "../common/checks.h"
#include "../common/isa.h"
#include "cpu_args.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

void run(TvConv2dPass pass, const TvConv2dArgs& k, int64_t items, bool whole_images) {
  const size_t bytes = tv_conv2d_scratch(k, whole_images, k.kind == Kind::f64 ? 8 : 4);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Freed> scratch(::operator new(bytes, std::align_val_t(64)));
    pass(k, begin, end, scratch.get());
  });
}

void* data_of(const Tensor& x, const char* name, int64_t numel, Kind kind) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, " is not a contiguous tensor on the CPU");
  STD_TORCH_CHECK(kind_of(x, name) == kind, name, " does not have the dtype of x");
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements instead of ", numel);
  return x.data_ptr();
}

TvConv2dArgs inputs(const Tensor& x, const Tensor& weight, int64_t size, int64_t stride, int64_t block_rows) {
  TvConv2dArgs k{};
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x must be (B, C, H, W) and weight (C, k * k, H, W)");
  STD_TORCH_CHECK(size > 0 && size % 2 == 1 && stride > 0 && block_rows > 0, "sizes out of range");
  k.kind = kind_of(x, "x");
  k.batch = x.size(0);
  k.channels = x.size(1);
  k.height = x.size(2);
  k.width = x.size(3);
  k.size = size;
  k.stride = stride;
  k.out_height = (k.height - 1) / stride + 1;
  k.out_width = (k.width - 1) / stride + 1;
  k.block_rows = block_rows;
  k.blocks = (k.out_height + block_rows - 1) / block_rows;
  k.x = data_of(x, "x", k.batch * k.channels * k.height * k.width, k.kind);
  k.weight = data_of(weight, "weight", k.channels * size * size * k.out_height * k.out_width, k.kind);
  return k;
}

const TvConv2dPasses& passes_of(const TvConv2dArgs& k) {
  const TvConv2dKernels& kernels = select(tv_conv2d_baseline, tv_conv2d_avx2, tv_conv2d_avx512);
  switch (k.kind) {
    case Kind::f64:
      return kernels.f64;
    case Kind::bf16:
      return kernels.bf16;
    case Kind::f16:
      return kernels.f16;
    default:
      return kernels.f32;
  }
}

void tv_conv2d_fwd_cpu(Tensor x, Tensor weight, Optional bias, int64_t size, int64_t stride,
                       int64_t block_rows, Tensor out) {
  TvConv2dArgs k = inputs(x, weight, size, stride, block_rows);
  const int64_t plane = k.channels * k.out_height * k.out_width;
  k.bias = bias.has_value() ? data_of(*bias, "bias", plane, k.kind) : nullptr;
  k.out = data_of(out, "out", k.batch * plane, k.kind);
  run(passes_of(k).forward, k, k.channels * k.blocks, false);
}

void tv_conv2d_bwd_cpu(Tensor dout, Tensor x, Tensor weight, int64_t size, int64_t stride, int64_t block_rows,
                       Tensor dx, Tensor dweight, Optional dbias) {
  TvConv2dArgs k = inputs(x, weight, size, stride, block_rows);
  const bool wide = k.kind == Kind::f64;
  const int64_t plane = k.channels * k.out_height * k.out_width;
  k.dout = data_of(dout, "dout", k.batch * plane, k.kind);
  k.dx = data_of(dx, "dx", x.numel(), k.kind);
  k.dweight = pointer_of(dweight, "dweight", weight.numel(), wide);
  k.dbias = pointer_of(dbias, "dbias", plane, wide);
  run(passes_of(k).backward_weight, k, k.channels * k.blocks, false);
  run(passes_of(k).backward_input, k, k.channels * ((k.batch + kInputImages - 1) / kInputImages), true);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "tv_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, int size, int stride, int block_rows, "
      "Tensor(a!) out) -> ()");
  m.def(
      "tv_conv2d_bwd(Tensor dout, Tensor x, Tensor weight, int size, int stride, int block_rows, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("tv_conv2d_fwd", TORCH_BOX(&vitzoo::tv_conv2d_fwd_cpu));
  m.impl("tv_conv2d_bwd", TORCH_BOX(&vitzoo::tv_conv2d_bwd_cpu));
}
