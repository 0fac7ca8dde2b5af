// vitzoo_native::selective_scan_fwd and selective_scan_bwd on the CPU. kernels/selective_scan/cpu.py
// allocates every output and brings the small tensors to the compute type; shapes are in cpu_args.h.

#include <algorithm>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "host.h"

namespace vitzoo {
namespace {

using Optional = OptionalTensor;

void run(SelectiveScanPass pass, const SelectiveScanArgs& args, size_t scratch_bytes) {
  parallel_with_scratch(args.batch * args.groups * args.parts, scratch_bytes,
                        [&](int64_t begin, int64_t end, void* scratch) { pass(args, begin, end, scratch); });
}

// What the pieces of a divided scan pass on, and the passes over it.
struct Divided {
  DividedScanArgs args{};
  std::unique_ptr<void, FreeAligned> states, steps, gradients;
  size_t scratch_bytes;
  int64_t items;

  Divided(const SelectiveScanArgs& k, int64_t tokens, bool backward) {
    STD_TORCH_CHECK(tokens % kBackwardTokens == 0 && !k.constant_b && !k.constant_c,
                    "a scan is divided into pieces of multiples of ", kBackwardTokens,
                    " tokens, and where B and C are not constant");
    args.scan = &k;
    args.tokens = tokens;
    args.pieces = (k.seqlen + tokens - 1) / tokens;
    items = k.batch * k.groups * k.parts;
    const size_t element = k.u.kind == Kind::f64 ? 8 : 4, channels = element * size_t(k.batch * k.dim);
    const auto allocate = [](size_t bytes) {
      return std::unique_ptr<void, FreeAligned>(::operator new(bytes, std::align_val_t(64)));
    };
    states = allocate(channels * size_t((args.pieces + 1) * k.dstate));
    steps = allocate(channels * size_t(args.pieces));
    gradients = allocate(backward ? channels * size_t(args.pieces * k.dstate) : 0);
    args.states = states.get();
    args.steps = steps.get();
    args.gradients = backward ? gradients.get() : nullptr;
    scratch_bytes = std::max(selective_scan_forward_scratch(k.dstate),
                             selective_scan_backward_scratch(k.dstate, backward ? k.seqlen : 0));
  }

  void run(DividedScanPass pass, int64_t each) const {
    parallel_with_scratch(items * each, scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
      pass(args, begin, end, scratch);
    });
  }

  // Only blocks are run twice, once for their outline, so there are no more than the threads need: one for
  // each at a time, and one of them, the last, needs no outline.
  void forward(const DividedScanKernels& kernels) {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const int64_t wanted = threads <= items ? 1 : (threads + items - 1) / items + 1;
    args.block = (args.pieces + wanted - 1) / wanted;
    args.blocks = (args.pieces + args.block - 1) / args.block;
    run(kernels.first, std::max<int64_t>(args.blocks - 1, 1));
    if (args.blocks > 1) {
      run(kernels.carry, 1);
      run(kernels.second, args.blocks - 1);
    }
  }

  void backward(const DividedScanKernels& kernels) const {
    run(kernels.outline, args.pieces);
    run(kernels.carry_both, 1);
    run(kernels.backward, args.pieces);
  }
};

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
    Divided(k, piece_tokens, false).forward(wide ? kernels.divided_f64 : kernels.divided_f32);
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
  STD_TORCH_CHECK(piece_tokens == 0 || piece_tokens == kBackwardTokens, "piece_tokens is ", piece_tokens,
                  ", neither 0 nor ", kBackwardTokens);
  k.pieces = piece_tokens == 0 ? 1 : (k.seqlen + piece_tokens - 1) / piece_tokens;
  scan_gradients(k, ddelta, da, db, dc, dd, ddelta_bias);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  if (piece_tokens > 0) {
    Divided(k, piece_tokens, true).backward(wide ? kernels.divided_f64 : kernels.divided_f32);
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
