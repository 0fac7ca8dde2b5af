// The CUDA kernels of window attention on CPU tensors, by their host form, and the schemas of both forms.

#include "cuda_launch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "window_attention_cuda_fwd(Tensor qkv, int heads, int window_h, int window_w, int shift_h, int "
      "shift_w, "
      "Tensor? bias, float scale, Tensor? pad, bool roll_first, int warps_per_item, Tensor(a!) out) -> ()");
  m.def(
      "window_attention_cuda_bwd(Tensor dout, Tensor qkv, int heads, int window_h, int window_w, int "
      "shift_h, "
      "int shift_w, Tensor? bias, float scale, Tensor? pad, bool roll_first, int warps_per_item, "
      "int windows_per_part, Tensor(a!) dqkv, Tensor(b!)? dbias, Tensor(c!)? dpad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("window_attention_cuda_fwd", TORCH_BOX(&vitzoo::window_attention_cuda_fwd<vitzoo::HostLaunch>));
  m.impl("window_attention_cuda_bwd", TORCH_BOX(&vitzoo::window_attention_cuda_bwd<vitzoo::HostLaunch>));
}
