// The CUDA kernels of the selective scan on CPU tensors, by their host form, and the schemas of both forms.

#include "cuda_launch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "selective_scan_cuda_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus, int tokens, int threads, Tensor(a!) out, "
      "Tensor(b!) last_state) -> ()");
  m.def(
      "selective_scan_cuda_bwd(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, int tokens, int threads, "
      "int part_channels, Tensor(a!)? starts, Tensor(b!) du, Tensor(c!) ddelta, Tensor(d!) dA, "
      "Tensor(e!) dB, Tensor(f!) dC, Tensor(g!)? dD, Tensor(h!)? dz, Tensor(i!)? ddelta_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("selective_scan_cuda_fwd", TORCH_BOX(&vitzoo::selective_scan_cuda_fwd<vitzoo::HostLaunch>));
  m.impl("selective_scan_cuda_bwd", TORCH_BOX(&vitzoo::selective_scan_cuda_bwd<vitzoo::HostLaunch>));
}
