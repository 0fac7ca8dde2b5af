// vitzoo_native::selective_scan_fwd and selective_scan_bwd on the CPU. kernels/selective_scan/cpu.py
// allocates every output and brings the small tensors to the compute type; shapes are in cpu_args.h.

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

void run(SelectiveScanPass pass, const SelectiveScanArgs& args, size_t scratch_bytes) {
  const int64_t items = args.batch * args.groups * args.parts;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Freed> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
    pass(args, begin, end, scratch.get());
  });
}

SelectiveScanArgs inputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                         const Tensor& c, const Optional& d, const Optional& z, const Optional& delta_bias,
                         bool delta_softplus, int64_t part_channels) {
  SelectiveScanArgs k{};
  STD_TORCH_CHECK(u.dim() == 3 && a.dim() == 2, "u must be (B, D, L) and A (D, N)");
  k.batch = u.size(0);
  k.dim = u.size(1);
  k.seqlen = u.size(2);
  k.dstate = a.size(1);
  k.constant_b = b.dim() == 2;
  k.constant_c = c.dim() == 2;
  k.groups = !k.constant_b ? b.size(1) : !k.constant_c ? c.size(1) : 1;
  STD_TORCH_CHECK(k.groups > 0 && k.dim % k.groups == 0 && part_channels > 0,
                  "groups do not divide the channels");
  k.group_channels = k.dim / k.groups;
  k.part_channels = part_channels;
  k.parts = (k.group_channels + part_channels - 1) / part_channels;
  k.delta_softplus = delta_softplus;
  const bool wide = u.scalar_type() == ScalarType::Double;
  const int64_t states = k.dim * k.dstate, rows = k.batch * k.groups * k.dstate * k.seqlen;
  k.u = view_of(u, "u", k.batch, k.dim, k.seqlen, wide);
  k.delta = view_of(delta, "delta", k.batch, k.dim, k.seqlen, wide);
  k.z = view_of(z, "z", k.batch, k.dim, k.seqlen, wide);
  k.a = pointer_of(a, "A", states, wide);
  k.b = pointer_of(b, "B", k.constant_b ? states : rows, wide);
  k.c = pointer_of(c, "C", k.constant_c ? states : rows, wide);
  k.d = pointer_of(d, "D", k.dim, wide);
  k.delta_bias = pointer_of(delta_bias, "delta_bias", k.dim, wide);
  return k;
}

View output(const Tensor& x, const char* name, const SelectiveScanArgs& k) {
  const View view = view_of(x, name, k.batch, k.dim, k.seqlen, k.u.kind == Kind::f64);
  STD_TORCH_CHECK(view.token == 1, name, " must be contiguous along the tokens");
  return view;
}

void selective_scan_fwd_cpu(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Optional d, Optional z,
                            Optional delta_bias, bool delta_softplus, int64_t part_channels, Tensor out,
                            Tensor last_state) {
  SelectiveScanArgs k = inputs(u, delta, a, b, c, d, z, delta_bias, delta_softplus, part_channels);
  const bool wide = k.u.kind == Kind::f64;
  k.out = output(out, "out", k);
  k.last_state = pointer_of(last_state, "last_state", k.batch * k.dim * k.dstate, wide);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  run(wide ? kernels.forward_f64 : kernels.forward_f32, k, selective_scan_forward_scratch(k.dstate));
}

void selective_scan_bwd_cpu(Tensor dout, Optional dlast_state, Tensor u, Tensor delta, Tensor a, Tensor b,
                            Tensor c, Optional d, Optional z, Optional delta_bias, bool delta_softplus,
                            int64_t part_channels, Tensor du, Tensor ddelta, Tensor da, Tensor db, Tensor dc,
                            Optional dd, Optional dz, Optional ddelta_bias) {
  SelectiveScanArgs k = inputs(u, delta, a, b, c, d, z, delta_bias, delta_softplus, part_channels);
  const bool wide = k.u.kind == Kind::f64;
  const int64_t states = k.batch * k.dim * k.dstate;
  const int64_t rows = k.batch * k.parts * k.groups * k.dstate * k.seqlen;
  k.dout = view_of(dout, "dout", k.batch, k.dim, k.seqlen, wide);
  k.du = output(du, "du", k);
  k.ddelta = output(ddelta, "ddelta", k);
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  k.dz = z.has_value() ? output(*dz, "dz", k) : View{};
  k.dlast_state = pointer_of(dlast_state, "dlast_state", states, wide);
  k.da = pointer_of(da, "dA", states, wide);
  k.db = pointer_of(db, "dB", k.constant_b ? states : rows, wide);
  k.dc = pointer_of(dc, "dC", k.constant_c ? states : rows, wide);
  k.dd = pointer_of(dd, "dD", k.batch * k.dim, wide);
  k.ddelta_bias = pointer_of(ddelta_bias, "ddelta_bias", k.batch * k.dim, wide);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  run(wide ? kernels.backward_f64 : kernels.backward_f32, k,
      selective_scan_backward_scratch(k.dstate, k.seqlen));
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus, int part_channels, Tensor(a!) out, Tensor(b!) last_state) -> "
      "()");
  m.def(
      "selective_scan_bwd(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, int part_channels, Tensor(a!) du, "
      "Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, "
      "Tensor(h!)? ddelta_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&vitzoo::selective_scan_fwd_cpu));
  m.impl("selective_scan_bwd", TORCH_BOX(&vitzoo::selective_scan_bwd_cpu));
}
