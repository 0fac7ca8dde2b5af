// Window attention on CUDA devices; the schemas are in cuda_host.cpp.

#include "cuda_launch.h"

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CUDA, m) {
  m.impl("window_attention_cuda_fwd", TORCH_BOX(&vitzoo::window_attention_cuda_fwd<vitzoo::DeviceLaunch>));
  m.impl("window_attention_cuda_bwd", TORCH_BOX(&vitzoo::window_attention_cuda_bwd<vitzoo::DeviceLaunch>));
}
