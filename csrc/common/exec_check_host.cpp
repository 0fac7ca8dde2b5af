#include "exec_check.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) { m.def("exec_check(int what, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("exec_check", TORCH_BOX(&vitzoo::exec_check<vitzoo::HostLaunch>));
}
