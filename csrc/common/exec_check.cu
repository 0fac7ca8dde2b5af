#include "exec_check.cuh"

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CUDA, m) {
  m.impl("exec_check", TORCH_BOX(&vitzoo::exec_check<vitzoo::DeviceLaunch>));
}
