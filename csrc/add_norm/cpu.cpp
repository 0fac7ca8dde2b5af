// vitzoo_native::add_norm_fwd and add_norm_bwd on the CPU, for add_rms_norm and add_layer_norm.
// kernels/add_norm/cpu.py allocates every output; the kernels are in common/row_norm_kernel.h.

#include "../common/row_norm_run.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

void add_norm_fwd_cpu(Tensor x, Optional residual, Tensor weight, Optional bias, double eps, bool center,
                      Tensor out, Tensor residual_out) {
  RowNormArgs k = row_norm_args(x, eps, center, false);
  const bool wide = k.x.kind == Kind::f64;
  k.residual = rows_of(residual, "residual", k, wide);
  k.weight = pointer_of(weight, "weight", k.channels, wide);
  k.bias = pointer_of(bias, "bias", k.channels, wide);
  k.out = rows_of(out, "out", k, wide);
  k.r = pointer_of(residual_out, "residual_out", k.rows * k.channels, wide);
  run_row_norm(k, false);
}

void add_norm_bwd_cpu(Tensor dout, Optional dresidual_out, Tensor residual_out, Tensor x, Tensor weight,
                      double eps, bool center, int64_t part_rows, Tensor dx, Optional dresidual,
                      Tensor dweight, Optional dbias) {
  RowNormArgs k = row_norm_args(x, eps, center, false);
  const bool wide = k.x.kind == Kind::f64;
  STD_TORCH_CHECK(part_rows > 0, "part_rows is ", part_rows);
  const int64_t sums = (k.rows + part_rows - 1) / part_rows * k.channels;
  k.part_rows = part_rows;
  k.weight = pointer_of(weight, "weight", k.channels, wide);
  k.r = pointer_of(residual_out, "residual_out", k.rows * k.channels, wide);
  k.dr = pointer_of(dresidual_out, "dresidual_out", k.rows * k.channels, wide);
  k.dout = rows_of(dout, "dout", k, wide);
  k.dx = rows_of(dx, "dx", k, wide);
  k.dresidual = rows_of(dresidual, "dresidual", k, wide);
  k.dweight = pointer_of(dweight, "dweight", sums, wide);
  k.dbias = pointer_of(dbias, "dbias", sums, wide);
  run_row_norm(k, true);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "add_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool center, "
      "Tensor(a!) out, Tensor(b!) residual_out) -> ()");
  m.def(
      "add_norm_bwd(Tensor dout, Tensor? dresidual_out, Tensor residual_out, Tensor x, Tensor weight, "
      "float eps, bool center, int part_rows, Tensor(a!) dx, Tensor(b!)? dresidual, Tensor(c!) dweight, "
      "Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("add_norm_fwd", TORCH_BOX(&vitzoo::add_norm_fwd_cpu));
  m.impl("add_norm_bwd", TORCH_BOX(&vitzoo::add_norm_bwd_cpu));
}
