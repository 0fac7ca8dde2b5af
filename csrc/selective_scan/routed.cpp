// vitzoo_native::routed_scan_fwd and routed_scan_bwd on the CPU; kernels/common/routed_scan.py allocates
// every output and brings the small tensors to the compute type, B and C to the order of their route. See
// README.md.

#include <vector>

#include "../common/isa.h"
#include "divided.h"

namespace vitzoo {
namespace {

using Tensors = std::vector<Tensor>;

OptionalTensor entry(const Tensors& list, int64_t r) {
  return list.empty() ? OptionalTensor() : OptionalTensor(list[size_t(r)]);
}

// The arguments of every route, and what they point to.
struct Routes {
  std::vector<SelectiveScanArgs> args;
  std::vector<int64_t> code, columns;
  bool shared;

  RoutedScanArgs get() const {
    return {int64_t(args.size()), shared, args.data(), code.data(),
            columns.empty() ? nullptr : columns.data()};
  }
};

void check_length(const Tensors& list, const char* name, size_t routes, bool optional) {
  STD_TORCH_CHECK(list.size() == routes || (optional && list.empty()), name, " has ", list.size(),
                  " entries for ", routes, " routes");
}

Routes make_routes(const Tensors& u, const Tensors& delta, const Tensors& a, const Tensors& b,
                   const Tensors& c, const Tensors& d, const OptionalTensor& z, const Tensors& delta_bias,
                   bool delta_softplus, const std::vector<int64_t>& code, int64_t width,
                   int64_t part_channels) {
  Routes routes;
  routes.code = code;
  routes.shared = u.size() == 1;
  const size_t count = code.size();
  STD_TORCH_CHECK(count > 0, "there are no routes");
  check_length(u, "u", routes.shared ? 1 : count, false);
  check_length(delta, "delta", count, false);
  check_length(a, "A", count, false);
  check_length(b, "B", count, false);
  check_length(c, "C", count, false);
  check_length(d, "D", count, true);
  check_length(delta_bias, "delta_bias", count, true);
  bool by_columns = false;
  for (size_t r = 0; r < count; ++r) {
    STD_TORCH_CHECK(code[r] >= 0 && code[r] < 4, "route ", code[r], " is not 0, 1, 2 or 3");
    by_columns = by_columns || (code[r] & 1);
    routes.args.push_back(scan_inputs(u[routes.shared ? 0 : r], delta[r], a[r], b[r], c[r],
                                      entry(d, int64_t(r)), z, entry(delta_bias, int64_t(r)), delta_softplus,
                                      part_channels));
    const SelectiveScanArgs &k = routes.args[r], &first = routes.args[0];
    STD_TORCH_CHECK(!k.constant_b && !k.constant_c, "B and C of a route cannot be constant");
    STD_TORCH_CHECK(k.batch == first.batch && k.dim == first.dim && k.seqlen == first.seqlen &&
                        k.dstate == first.dstate && k.groups == first.groups &&
                        (k.u.kind == Kind::f64) == (first.u.kind == Kind::f64),
                    "route ", r, " has other sizes than the first");
  }
  const int64_t seqlen = routes.args[0].seqlen;
  STD_TORCH_CHECK(width > 0 && seqlen % width == 0, "width ", width, " does not divide ", seqlen, " tokens");
  if (by_columns) {
    routes.columns.reserve(size_t(seqlen));
    for (int64_t column = 0; column < width; ++column) {
      for (int64_t pixel = column; pixel < seqlen; pixel += width) {
        routes.columns.push_back(pixel);
      }
    }
  }
  return routes;
}

void run(RoutedScanPass pass, const Routes& routes, size_t scratch_bytes) {
  const SelectiveScanArgs& first = routes.args[0];
  const RoutedScanArgs args = routes.get();
  parallel_with_scratch(first.batch * first.groups * first.parts, scratch_bytes,
                        [&](int64_t begin, int64_t end, void* scratch) { pass(args, begin, end, scratch); });
}

// All passes over the tiles of args, forward and backward; run(pass, args, work, with_scratch) runs one.
template <class Run>
void divided_forward(const DividedRoutesKernels& kernels, DividedRoutesArgs args, const Run& run) {
  const DividedScanArgs& d = args.divided[0];
  const int64_t pieces = args.items * d.pieces, scans = args.items * args.at_once, others = d.blocks - 1;
  for (args.route = 0; args.route < args.routed->routes; args.route += args.at_once) {
    run(kernels.load, args, pieces, false);
    run(kernels.first, args, scans * std::max<int64_t>(others, 1), true);
    if (others > 0) {
      run(kernels.carry, args, scans, false);
      run(kernels.second, args, scans * others, true);
    }
    if (args.at_once > 1 || args.route + 1 == args.routed->routes) {
      run(kernels.add, args, pieces, false);
    }
  }
}

template <class Run>
void divided_backward(const DividedRoutesKernels& kernels, DividedRoutesArgs args, const Run& run) {
  const int64_t pieces = args.items * args.divided[0].pieces;
  for (args.route = 0; args.route < args.routed->routes; ++args.route) {
    run(kernels.exchange, args, pieces, false);
    run(kernels.outline, args, pieces, true);
    run(kernels.carry_both, args, args.items, false);
    run(kernels.backward, args, pieces, true);
  }
  run(kernels.exchange, args, pieces, false);
}

// A routed scan divided along its tokens. With work items for all threads each runs all passes over a tile of
// its own at a time; else the threads share the passes over one tile of every item, and forward run all
// routes at once, so that fewer blocks need an outline. Backward every piece has one, and all routes add to
// one gradient of u, one after the other.
void run_divided(const DividedRoutesKernels& kernels, const Routes& routes, int64_t tokens, bool backward) {
  const RoutedScanArgs routed = routes.get();
  const SelectiveScanArgs& k = routed.route[0];
  const int64_t items = k.batch * k.groups * k.parts;
  const bool alone = int64_t(torch::stable::get_num_threads()) <= items;
  DividedRoutesArgs args{};
  args.routed = &routed;
  args.at_once = alone || backward ? 1 : routed.routes;

  std::vector<Divided> own;
  std::vector<DividedScanArgs> divided;
  for (int64_t r = 0; r < routed.routes; ++r) {
    if (r < args.at_once) {
      own.emplace_back(k, tokens, backward);
      own.back().make_blocks(items * args.at_once);
    }
    divided.push_back(own.back().args);
    divided.back().scan = routed.route + r;
  }
  args.divided = divided.data();

  const size_t scratch_bytes = own[0].scratch_bytes;
  const int64_t planes =
      backward ? kRoutedBackwardPlanes : routed_scan_forward_planes(routed.shared, args.at_once);
  const size_t plane_bytes = size_t(planes * k.seqlen * kernels.lanes) * (k.u.kind == Kind::f64 ? 8 : 4);
  const auto run_all = [&](const DividedRoutesArgs& of, const auto& run) {
    backward ? divided_backward(kernels, of, run) : divided_forward(kernels, of, run);
  };
  const int64_t channels = std::min(k.part_channels, k.group_channels);
  if (alone) {
    args.items = 1;
    parallel_with_scratch(items, scratch_bytes + plane_bytes, [&](int64_t begin, int64_t end, void* scratch) {
      DividedRoutesArgs mine = args;
      mine.planes = static_cast<char*>(scratch) + scratch_bytes;
      for (mine.item = begin; mine.item < end; ++mine.item) {
        for (mine.channel = 0; mine.channel < channels; mine.channel += kernels.lanes) {
          run_all(mine, [&](DividedRoutesPass pass, const DividedRoutesArgs& of, int64_t work, bool) {
            pass(of, 0, work, scratch);
          });
        }
      }
    });
    return;
  }
  args.items = items;
  const std::unique_ptr<void, FreeAligned> memory(
      ::operator new(plane_bytes * size_t(items), std::align_val_t(64)));
  args.planes = memory.get();
  for (args.channel = 0; args.channel < channels; args.channel += kernels.lanes) {
    run_all(args, [&](DividedRoutesPass pass, const DividedRoutesArgs& of, int64_t work, bool with_scratch) {
      parallel_with_scratch(
          work, with_scratch ? scratch_bytes : 0,
          [&](int64_t begin, int64_t end, void* scratch) { pass(of, begin, end, scratch); });
    });
  }
}

void routed_scan_fwd_cpu(Tensors u, Tensors delta, Tensors a, Tensors b, Tensors c, Tensors d,
                         OptionalTensor z, Tensors delta_bias, bool delta_softplus, std::vector<int64_t> code,
                         int64_t width, int64_t part_channels, int64_t piece_tokens, Tensor out) {
  Routes routes =
      make_routes(u, delta, a, b, c, d, z, delta_bias, delta_softplus, code, width, part_channels);
  SelectiveScanArgs& first = routes.args[0];
  first.out = scan_output(out, "out", first);
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  if (piece_tokens > 0) {
    run_divided(first.u.kind == Kind::f64 ? kernels.divided_routes_f64 : kernels.divided_routes_f32, routes,
                piece_tokens, false);
    return;
  }
  run(first.u.kind == Kind::f64 ? kernels.routed_forward_f64 : kernels.routed_forward_f32, routes,
      routed_scan_forward_scratch(first.dstate, first.seqlen));
}

void routed_scan_bwd_cpu(Tensor dout, Tensors u, Tensors delta, Tensors a, Tensors b, Tensors c, Tensors d,
                         OptionalTensor z, Tensors delta_bias, bool delta_softplus, std::vector<int64_t> code,
                         int64_t width, int64_t part_channels, int64_t piece_tokens, Tensors du,
                         Tensors ddelta, Tensors da, Tensors db, Tensors dc, Tensors dd, OptionalTensor dz,
                         Tensors ddelta_bias) {
  Routes routes =
      make_routes(u, delta, a, b, c, d, z, delta_bias, delta_softplus, code, width, part_channels);
  const size_t count = code.size();
  check_length(du, "du", u.size(), false);
  check_length(ddelta, "ddelta", count, false);
  check_length(da, "dA", count, false);
  check_length(db, "dB", count, false);
  check_length(dc, "dC", count, false);
  check_length(dd, "dD", d.size(), false);
  check_length(ddelta_bias, "ddelta_bias", delta_bias.size(), false);
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  SelectiveScanArgs& first = routes.args[0];
  const bool wide = first.u.kind == Kind::f64;
  first.dout = view_of(dout, "dout", first.batch, first.dim, first.seqlen, wide);
  first.dz = z.has_value() ? scan_output(*dz, "dz", first) : View{};
  for (size_t r = 0; r < count; ++r) {
    SelectiveScanArgs& k = routes.args[r];
    k.pieces = backward_pieces(piece_tokens, k.seqlen);
    k.du = scan_output(du[routes.shared ? 0 : r], "du", k);
    scan_gradients(k, ddelta[r], da[r], db[r], dc[r], entry(dd, int64_t(r)), entry(ddelta_bias, int64_t(r)));
  }
  const SelectiveScanKernels& kernels =
      select(selective_scan_baseline, selective_scan_avx2, selective_scan_avx512);
  if (piece_tokens > 0) {
    run_divided(wide ? kernels.divided_routes_f64 : kernels.divided_routes_f32, routes, piece_tokens, true);
    return;
  }
  run(wide ? kernels.routed_backward_f64 : kernels.routed_backward_f32, routes,
      routed_scan_backward_scratch(first.dstate, first.seqlen));
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "routed_scan_fwd(Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, "
      "Tensor? z, Tensor[] delta_bias, bool delta_softplus, int[] routes, int width, int part_channels, "
      "int piece_tokens, Tensor(a!) out) -> ()");
  m.def(
      "routed_scan_bwd(Tensor dout, Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, "
      "Tensor[] D, Tensor? z, Tensor[] delta_bias, bool delta_softplus, int[] routes, int width, "
      "int part_channels, int piece_tokens, Tensor(a!)[] du, Tensor(b!)[] ddelta, Tensor(c!)[] dA, "
      "Tensor(d!)[] dB, Tensor(e!)[] dC, Tensor(f!)[] dD, Tensor(g!)? dz, Tensor(h!)[] ddelta_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("routed_scan_fwd", TORCH_BOX(&vitzoo::routed_scan_fwd_cpu));
  m.impl("routed_scan_bwd", TORCH_BOX(&vitzoo::routed_scan_bwd_cpu));
}
