// vitzoo_native::selective_scan_fwd and selective_scan_bwd on the CPU. kernels/selective_scan/cpu.py
// allocates every output and brings the small tensors to the compute type; shapes are in cpu_args.h.

#include "../common/isa.h"
#include "divided.h"

namespace vitzoo {
namespace {

using Optional = OptionalTensor;

void run(SelectiveScanPass pass, const SelectiveScanArgs& args, size_t scratch_bytes) {
  parallel_with_scratch(args.batch * args.groups * args.parts, scratch_bytes,
                        [&](int64_t begin, int64_t end, void* scratch) { pass(args, begin, end, scratch); });
}

void run(DividedScanPass pass, const Divided& divided, int64_t items) {
  parallel_with_scratch(items, divided.scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
    pass(divided.args, begin, end, scratch);
  });
}

void run_forward(const DividedScanKernels& kernels, const SelectiveScanArgs& k, int64_t tokens) {
  Divided divided(k, tokens, false);
  const int64_t items = k.batch * k.groups * k.parts;
  divided.make_blocks(items);
  const int64_t others = divided.args.blocks - 1;
  run(kernels.first, divided, items * std::max<int64_t>(others, 1));
  if (others > 0) {
    run(kernels.carry, divided, items);
    run(kernels.second, divided, items * others);
  }
}

void run_backward(const DividedScanKernels& kernels, const SelectiveScanArgs& k, int64_t tokens) {
  const Divided divided(k, tokens, true);
  const int64_t items = k.batch * k.groups * k.parts;
  run(kernels.outline, divided, items * divided.args.pieces);
  run(kernels.carry_both, divided, items);
  run(kernels.backward, divided, items * divided.args.pieces);
}

void selective_scan_fwd_cpu(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Optional d, Optional z,
                            Optional delta_bias, bool delta_softplus, int64_t part_channels,
                            int64_t piece_tokens, Tensor out, Tensor last_state) {
  SelectiveScanArgs k = scan_inputs(u, delta, a, b, c, d, z, delta_bias, delta_softplus, part_channels);
  const bool wide = k.u.kind == Kind::f64;
  k.out = scan_output(out, "out", k);
  k.last_state = pointer_of(last_state, "last_state", k.batch * k.dim * k.dstate, wide);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  if (piece_tokens > 0) {
    run_forward(wide ? kernels.divided_f64 : kernels.divided_f32, k, piece_tokens);
    return;
  }
  run(wide ? kernels.forward_f64 : kernels.forward_f32, k, selective_scan_forward_scratch(k.dstate));
}

void selective_scan_bwd_cpu(Tensor dout, Optional dlast_state, Tensor u, Tensor delta, Tensor a, Tensor b,
                            Tensor c, Optional d, Optional z, Optional delta_bias, bool delta_softplus,
                            int64_t part_channels, int64_t piece_tokens, Tensor du, Tensor ddelta, Tensor da,
                            Tensor db, Tensor dc, Optional dd, Optional dz, Optional ddelta_bias) {
  SelectiveScanArgs k = scan_inputs(u, delta, a, b, c, d, z, delta_bias, delta_softplus, part_channels);
  const bool wide = k.u.kind == Kind::f64;
  k.dout = view_of(dout, "dout", k.batch, k.dim, k.seqlen, wide);
  k.du = scan_output(du, "du", k);
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  k.dz = z.has_value() ? scan_output(*dz, "dz", k) : View{};
  k.dlast_state = pointer_of(dlast_state, "dlast_state", k.batch * k.dim * k.dstate, wide);
  k.pieces = backward_pieces(piece_tokens, k.seqlen);
  scan_gradients(k, ddelta, da, db, dc, dd, ddelta_bias);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  if (piece_tokens > 0) {
    run_backward(wide ? kernels.divided_f64 : kernels.divided_f32, k, piece_tokens);
    return;
  }
  run(wide ? kernels.backward_f64 : kernels.backward_f32, k,
      selective_scan_backward_scratch(k.dstate, k.seqlen));
}

// Evaluates the scan's exponential in a bare loop over all cores, `items` times as many as it returns:
// whoever times the call knows what the exponentials of a scan alone would take here.
int64_t exponentials_cpu(int64_t items) {
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  parallel_with_scratch(items, kExponentialsScratch, [&](int64_t begin, int64_t end, void* scratch) {
    kernels.exponentials(begin, end, scratch);
  });
  const std::unique_ptr<void, FreeAligned> scratch(
      ::operator new(kExponentialsScratch, std::align_val_t(64)));
  return kernels.exponentials(0, 0, scratch.get());
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus, int part_channels, int piece_tokens, Tensor(a!) out, "
      "Tensor(b!) last_state) -> "
      "()");
  m.def(
      "selective_scan_bwd(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, int part_channels, int piece_tokens, "
      "Tensor(a!) du, "
      "Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, "
      "Tensor(h!)? ddelta_bias) -> ()");
  m.def("scan_exponentials(int items) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&vitzoo::selective_scan_fwd_cpu));
  m.impl("selective_scan_bwd", TORCH_BOX(&vitzoo::selective_scan_bwd_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CompositeExplicitAutograd, m) {
  m.impl("scan_exponentials", TORCH_BOX(&vitzoo::exponentials_cpu));
}
