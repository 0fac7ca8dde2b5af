// vitzoo_native::causal_conv1d_fwd and causal_conv1d_bwd on the CPU. kernels/causal_conv1d/cpu.py allocates
// every output and brings weight and bias to the compute type; shapes are in cpu_args.h.

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

void run(CausalConv1dPass pass, const CausalConv1dArgs& args, size_t scratch_bytes) {
  torch::stable::parallel_for(0, args.batch * args.parts * args.tiles, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Freed> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
    pass(args, begin, end, scratch.get());
  });
}

CausalConv1dArgs inputs(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& initial,
                        bool silu, bool reverse, int64_t part_tokens) {
  CausalConv1dArgs k{};
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, D, L) and weight (D, W)");
  k.batch = x.size(0);
  k.dim = x.size(1);
  k.seqlen = x.size(2);
  k.width = weight.size(1);
  STD_TORCH_CHECK(k.width >= 2 && k.width <= kConvMaxWidth, "weight has width ", k.width, ", not 2, 3 or 4");
  STD_TORCH_CHECK(part_tokens > 0, "part_tokens is ", part_tokens);
  k.tiles = (k.dim + kConvChannels - 1) / kConvChannels;
  k.part_tokens = part_tokens;
  k.parts = (k.seqlen + part_tokens - 1) / part_tokens;
  k.silu = silu;
  k.reverse = reverse;
  const bool wide = x.scalar_type() == ScalarType::Double;
  k.x = view_of(x, "x", k.batch, k.dim, k.seqlen, wide);
  k.columns = k.x.token != 1;
  STD_TORCH_CHECK(!k.columns || k.x.channel == 1,
                  "x is contiguous neither along the tokens nor the channels");
  k.initial = view_of(initial, "initial_states", k.batch, k.dim, k.width - 1, wide);
  k.weight = pointer_of(weight, "weight", k.dim * k.width, wide);
  k.bias = pointer_of(bias, "bias", k.dim, wide);
  return k;
}

// A tensor in the layout of x.
View like_x(const Tensor& y, const char* name, const CausalConv1dArgs& k) {
  const View view = view_of(y, name, k.batch, k.dim, k.seqlen, k.x.kind == Kind::f64);
  STD_TORCH_CHECK((k.columns ? view.channel : view.token) == 1, name, " does not have the layout of x");
  STD_TORCH_CHECK(view.kind == k.x.kind, name, " does not have the dtype of x");
  return view;
}

void causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Optional bias, Optional initial, bool silu, bool reverse,
                           int64_t part_tokens, Tensor out, Tensor final_states) {
  CausalConv1dArgs k = inputs(x, weight, bias, initial, silu, reverse, part_tokens);
  k.out = like_x(out, "out", k);
  k.final_states = view_of(final_states, "final_states", k.batch, k.dim, k.width - 1, k.x.kind == Kind::f64);
  STD_TORCH_CHECK(k.final_states.token == 1 && k.final_states.kind == k.x.kind,
                  "final_states is not contiguous in the dtype of x");
  STD_TORCH_CHECK(k.initial.data == nullptr || k.initial.kind == k.x.kind,
                  "initial_states does not have the dtype of x");
  const CausalConv1dKernels& kernels =
      select(causal_conv1d_baseline, causal_conv1d_avx2, causal_conv1d_avx512);
  run(k.x.kind == Kind::f64 ? kernels.forward_f64 : kernels.forward_f32, k, kConvForwardScratch);
}

void causal_conv1d_bwd_cpu(Tensor dout, Tensor x, Tensor weight, Optional bias, Optional initial, bool silu,
                           bool reverse, int64_t part_tokens, Tensor dx, Tensor dweight, Optional dbias,
                           Optional dinitial) {
  CausalConv1dArgs k = inputs(x, weight, bias, initial, silu, reverse, part_tokens);
  const bool wide = k.x.kind == Kind::f64;
  k.dout = like_x(dout, "dout", k);
  k.dx = like_x(dx, "dx", k);
  STD_TORCH_CHECK(initial.has_value() == dinitial.has_value(),
                  "dinitial_states is wanted exactly when initial_states is given");
  k.dinitial = view_of(dinitial, "dinitial_states", k.batch, k.dim, k.width - 1, wide);
  k.dweight = pointer_of(dweight, "dweight", k.batch * k.parts * k.dim * k.width, wide);
  k.dbias = pointer_of(dbias, "dbias", k.batch * k.parts * k.dim, wide);
  const CausalConv1dKernels& kernels =
      select(causal_conv1d_baseline, causal_conv1d_avx2, causal_conv1d_avx512);
  run(wide ? kernels.backward_f64 : kernels.backward_f32, k, kConvBackwardScratch);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, bool silu, "
      "bool reverse, int part_tokens, Tensor(a!) out, Tensor(b!) final_states) -> ()");
  m.def(
      "causal_conv1d_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, "
      "bool silu, bool reverse, int part_tokens, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, "
      "Tensor(d!)? dinitial_states) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&vitzoo::causal_conv1d_fwd_cpu));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&vitzoo::causal_conv1d_bwd_cpu));
}
