// The CUDA kernels of the causal convolution on CPU tensors, by their host form, and the schemas of both
// forms.

#include "cuda_launch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "causal_conv1d_cuda_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, bool silu, "
      "bool reverse, bool columns, int segment, int threads, Tensor(a!) out, Tensor(b!) final_states) -> ()");
  m.def(
      "causal_conv1d_cuda_bwd(Tensor dout, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_states, bool silu, bool reverse, bool columns, int segment, int threads, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("causal_conv1d_cuda_fwd", TORCH_BOX(&vitzoo::causal_conv1d_cuda_fwd<vitzoo::HostLaunch>));
  m.impl("causal_conv1d_cuda_bwd", TORCH_BOX(&vitzoo::causal_conv1d_cuda_bwd<vitzoo::HostLaunch>));
}
