// vitzoo_native::rms_norm_gated_fwd and rms_norm_gated_bwd on the CPU. kernels/rms_norm_gated/cpu.py
// allocates every output; the kernels are in common/row_norm_kernel.h.

#include "../common/row_norm_run.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

RowNormArgs inputs(const Tensor& x, const Tensor& weight, const Optional& z, double eps,
                   bool norm_before_gate) {
  RowNormArgs k = row_norm_args(x, eps, false, !norm_before_gate);
  const bool wide = k.x.kind == Kind::f64;
  k.weight = pointer_of(weight, "weight", k.channels, wide);
  k.z = rows_of(z, "z", k, wide);
  return k;
}

void rms_norm_gated_fwd_cpu(Tensor x, Tensor weight, Optional z, double eps, bool norm_before_gate,
                            Tensor out) {
  RowNormArgs k = inputs(x, weight, z, eps, norm_before_gate);
  k.out = rows_of(out, "out", k, k.x.kind == Kind::f64);
  run_row_norm(k, false);
}

void rms_norm_gated_bwd_cpu(Tensor dout, Tensor x, Tensor weight, Optional z, double eps,
                            bool norm_before_gate, int64_t part_rows, Tensor dx, Tensor dweight,
                            Optional dz) {
  RowNormArgs k = inputs(x, weight, z, eps, norm_before_gate);
  const bool wide = k.x.kind == Kind::f64;
  STD_TORCH_CHECK(part_rows > 0, "part_rows is ", part_rows);
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  k.part_rows = part_rows;
  k.dout = rows_of(dout, "dout", k, wide);
  k.dx = rows_of(dx, "dx", k, wide);
  k.dz = rows_of(dz, "dz", k, wide);
  k.dweight = pointer_of(dweight, "dweight", (k.rows + part_rows - 1) / part_rows * k.channels, wide);
  run_row_norm(k, true);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "rms_norm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, bool norm_before_gate, "
      "Tensor(a!) out) -> ()");
  m.def(
      "rms_norm_gated_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? z, float eps, "
      "bool norm_before_gate, int part_rows, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("rms_norm_gated_fwd", TORCH_BOX(&vitzoo::rms_norm_gated_fwd_cpu));
  m.impl("rms_norm_gated_bwd", TORCH_BOX(&vitzoo::rms_norm_gated_bwd_cpu));
}
