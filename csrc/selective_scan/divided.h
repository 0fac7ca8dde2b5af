// What the pieces of a scan that is divided along its tokens pass on, in memory; see DividedScanArgs.
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "host.h"

namespace vitzoo {

struct Divided {
  DividedScanArgs args{};
  std::unique_ptr<void, FreeAligned> states, steps, gradients;
  size_t scratch_bytes;

  Divided(const SelectiveScanArgs& k, int64_t tokens, bool backward) {
    STD_TORCH_CHECK(tokens % kBackwardTokens == 0 && !k.constant_b && !k.constant_c,
                    "a scan is divided into pieces of multiples of ", kBackwardTokens,
                    " tokens, and where B and C are not constant");
    args.scan = &k;
    args.tokens = tokens;
    args.pieces = (k.seqlen + tokens - 1) / tokens;
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

  // Blocks of the forward pass of that many scans at once. Only blocks are run twice, once for their outline,
  // so there are no more than the threads need: one for each at a time, and one of them, the last, needs no
  // outline.
  void make_blocks(int64_t scans) {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const int64_t wanted = threads <= scans ? 1 : (threads + scans - 1) / scans + 1;
    args.block = (args.pieces + wanted - 1) / wanted;
    args.blocks = (args.pieces + args.block - 1) / args.block;
  }
};

// Tokens of a piece in the backward pass, checked, to how many sums it keeps.
inline int64_t backward_pieces(int64_t piece_tokens, int64_t seqlen) {
  STD_TORCH_CHECK(piece_tokens == 0 || piece_tokens == kBackwardTokens, "piece_tokens is ", piece_tokens,
                  ", neither 0 nor ", kBackwardTokens);
  return piece_tokens == 0 ? 1 : (seqlen + piece_tokens - 1) / piece_tokens;
}

}  // namespace vitzoo
