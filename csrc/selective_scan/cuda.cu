// The selective scan on CUDA devices; the schemas are in cuda_host.cpp.

#include "cuda_launch.h"

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CUDA, m) {
  m.impl("selective_scan_cuda_fwd", TORCH_BOX(&vitzoo::selective_scan_cuda_fwd<vitzoo::DeviceLaunch>));
  m.impl("selective_scan_cuda_bwd", TORCH_BOX(&vitzoo::selective_scan_cuda_bwd<vitzoo::DeviceLaunch>));
}
