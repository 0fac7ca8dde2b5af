// vitzoo_native::cross_scan and cross_merge on the CPU. kernels/cross_scan/cpu.py allocates the outputs.

#include "../common/checks.h"
#include "../common/isa.h"
#include "cpu_args.h"

namespace vitzoo {
namespace {

CrossScanArgs arguments(const Tensor& map, const Tensor& routes) {
  STD_TORCH_CHECK(map.is_cpu() && routes.is_cpu(), "the tensors must be on the CPU");
  STD_TORCH_CHECK(map.dim() == 4 && routes.dim() == 4 && routes.size(0) == map.size(0) &&
                      routes.size(1) == 4 && routes.size(2) == map.size(1) &&
                      routes.size(3) == map.size(2) * map.size(3),
                  "the map must be (B, C, H, W) and its sequences (B, 4, C, H * W)");
  STD_TORCH_CHECK(map.is_contiguous() && routes.is_contiguous(), "the tensors must be contiguous");
  STD_TORCH_CHECK(map.scalar_type() == routes.scalar_type(), "the tensors must have one dtype");
  return {map.data_ptr(), routes.data_ptr(), map.size(1), map.size(2), map.size(3), kind_of(map, "the map")};
}

void run(CrossScanPass pass, const Tensor& map, const CrossScanArgs& args) {
  const int64_t planes = map.size(0) * map.size(1), size = args.height * args.width;
  const int64_t grain = size > 0 ? 1 + 16384 / size : planes + 1;  // 64 KiB of float32
  torch::stable::parallel_for(0, planes, grain, [&](int64_t begin, int64_t end) { pass(args, begin, end); });
}

void cross_scan_cpu(Tensor x, Tensor out) {
  const CrossScanArgs args = arguments(x, out);
  run(select(cross_scan_baseline, cross_scan_avx2, cross_scan_avx512).scan, x, args);
}

void cross_merge_cpu(Tensor y, Tensor out) {
  const CrossScanArgs args = arguments(out, y);
  run(select(cross_scan_baseline, cross_scan_avx2, cross_scan_avx512).merge, out, args);
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def("cross_scan(Tensor x, Tensor(a!) out) -> ()");
  m.def("cross_merge(Tensor y, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("cross_scan", TORCH_BOX(&vitzoo::cross_scan_cpu));
  m.impl("cross_merge", TORCH_BOX(&vitzoo::cross_merge_cpu));
}
