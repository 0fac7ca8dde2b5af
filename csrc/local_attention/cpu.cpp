// vitzoo_native::local_attention_fwd and local_attention_bwd on the CPU. kernels/local_attention/cpu.py
// allocates every output.

#include <memory>
#include <new>

#include "../common/checks.h"
#include "../common/isa.h"
#include "cpu_args.h"

namespace vitzoo {
namespace {

struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

void run(LocalAttentionPass pass, const LocalAttentionArgs& k, size_t scratch_bytes) {
  torch::stable::parallel_for(0, k.batch * k.heads * k.blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Freed> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
    pass(k, begin, end, scratch.get());
  });
}

Planes planes_of(const Tensor& x, const char* name, const LocalAttentionArgs& k, bool wide) {
  const int64_t channels = k.heads * k.channels, image = k.height * k.width;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == k.batch && x.size(1) == channels &&
                      x.size(2) == k.height && x.size(3) == k.width,
                  name, " does not have the shape of q on the CPU");
  STD_TORCH_CHECK((x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == k.width) &&
                      (channels == 1 || x.stride(1) == image),
                  name, " does not have contiguous images");
  Planes planes;
  planes.kind = kind_of(x, name);
  STD_TORCH_CHECK((planes.kind == Kind::f64) == wide, name, " must be float64 exactly when q is");
  planes.data = x.data_ptr();
  planes.batch = x.stride(0);
  return planes;
}

LocalAttentionArgs inputs(const Tensor& q, const Tensor& keys, const Tensor& values, int64_t kernel_height,
                          int64_t kernel_width, int64_t dilation, double scale, int64_t num_heads,
                          int64_t block_rows) {
  LocalAttentionArgs k{};
  STD_TORCH_CHECK(q.dim() == 4 && num_heads > 0 && q.size(1) % num_heads == 0 && block_rows > 0,
                  "q must be (B, C, H, W) with C a multiple of the heads");
  STD_TORCH_CHECK(kernel_height % 2 == 1 && kernel_width % 2 == 1 && kernel_height > 0 && kernel_width > 0 &&
                      dilation > 0,
                  "kernel sizes must be odd and the dilation positive");
  k.batch = q.size(0);
  k.heads = num_heads;
  k.channels = q.size(1) / num_heads;
  k.height = q.size(2);
  k.width = q.size(3);
  k.kernel_height = kernel_height;
  k.kernel_width = kernel_width;
  k.dilation = dilation;
  k.scale = scale;
  k.block_rows = block_rows;
  k.blocks = (k.height + block_rows - 1) / block_rows;
  const bool wide = q.scalar_type() == ScalarType::Double;
  k.q = planes_of(q, "q", k, wide);
  k.k = planes_of(keys, "k", k, wide);
  k.v = planes_of(values, "v", k, wide);
  return k;
}

const LocalAttentionPasses& passes_of(bool wide) {
  const LocalAttentionKernels& kernels =
      select(local_attention_baseline, local_attention_avx2, local_attention_avx512);
  return wide ? kernels.f64 : kernels.f32;
}

void local_attention_fwd_cpu(Tensor q, Tensor keys, Tensor values, int64_t kernel_height,
                             int64_t kernel_width, int64_t dilation, double scale, int64_t num_heads,
                             int64_t block_rows, Tensor out) {
  LocalAttentionArgs k =
      inputs(q, keys, values, kernel_height, kernel_width, dilation, scale, num_heads, block_rows);
  const bool wide = k.q.kind == Kind::f64;
  k.out = planes_of(out, "out", k, wide);
  run(passes_of(wide).forward, k, local_attention_scratch(k, wide ? 8 : 4));
}

void local_attention_bwd_cpu(Tensor dout, Tensor q, Tensor keys, Tensor values, int64_t kernel_height,
                             int64_t kernel_width, int64_t dilation, double scale, int64_t num_heads,
                             int64_t block_rows, Tensor weights, Tensor dscores, Tensor dq, Tensor dk,
                             Tensor dv) {
  LocalAttentionArgs k =
      inputs(q, keys, values, kernel_height, kernel_width, dilation, scale, num_heads, block_rows);
  const bool wide = k.q.kind == Kind::f64;
  const int64_t maps = k.batch * k.heads * kernel_height * kernel_width * k.height * k.width;
  k.dout = planes_of(dout, "dout", k, wide);
  k.dq = planes_of(dq, "dq", k, wide);
  k.dk = planes_of(dk, "dk", k, wide);
  k.dv = planes_of(dv, "dv", k, wide);
  k.weights = pointer_of(weights, "weights", maps, wide);
  k.dscores = pointer_of(dscores, "dscores", maps, wide);
  const size_t scratch = local_attention_scratch(k, wide ? 8 : 4);
  run(passes_of(wide).backward_maps, k, scratch);
  run(passes_of(wide).backward_windows, k, scratch);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "local_attention_fwd(Tensor q, Tensor k, Tensor v, int kernel_height, int kernel_width, int dilation, "
      "float scale, int num_heads, int block_rows, Tensor(a!) out) -> ()");
  m.def(
      "local_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, int kernel_height, int kernel_width, "
      "int dilation, float scale, int num_heads, int block_rows, Tensor(a!) weights, Tensor(b!) dscores, "
      "Tensor(c!) dq, Tensor(d!) dk, Tensor(e!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("local_attention_fwd", TORCH_BOX(&vitzoo::local_attention_fwd_cpu));
  m.impl("local_attention_bwd", TORCH_BOX(&vitzoo::local_attention_bwd_cpu));
}
