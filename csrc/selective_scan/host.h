// From tensors to SelectiveScanArgs, with the checks that keep the kernels inside their memory.
#pragma once

#include <optional>

#include "../common/checks.h"
#include "cpu_args.h"

namespace vitzoo {

using OptionalTensor = std::optional<Tensor>;

inline SelectiveScanArgs scan_inputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                     const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                     const OptionalTensor& delta_bias, bool delta_softplus,
                                     int64_t part_channels) {
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
  k.pieces = 1;
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

inline View scan_output(const Tensor& x, const char* name, const SelectiveScanArgs& k) {
  const View view = view_of(x, name, k.batch, k.dim, k.seqlen, k.u.kind == Kind::f64);
  STD_TORCH_CHECK(view.token == 1, name, " must be contiguous along the tokens");
  return view;
}

// The outputs of the backward pass but du and dz.
inline void scan_gradients(SelectiveScanArgs& k, const Tensor& ddelta, const Tensor& da, const Tensor& db,
                           const Tensor& dc, const OptionalTensor& dd, const OptionalTensor& ddelta_bias) {
  const bool wide = k.u.kind == Kind::f64;
  const int64_t channels = k.batch * k.pieces * k.dim, states = channels * k.dstate;
  const int64_t rows = k.batch * k.parts * k.groups * k.dstate * k.seqlen;
  k.ddelta = scan_output(ddelta, "ddelta", k);
  k.da = pointer_of(da, "dA", states, wide);
  k.db = pointer_of(db, "dB", k.constant_b ? states : rows, wide);
  k.dc = pointer_of(dc, "dC", k.constant_c ? states : rows, wide);
  k.dd = pointer_of(dd, "dD", channels, wide);
  k.ddelta_bias = pointer_of(ddelta_bias, "ddelta_bias", channels, wide);
}

}  // namespace vitzoo
