// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Tensors by pointer are contiguous and of the compute type T: float, or double where u is double.
struct SelectiveScanArgs {
  int64_t batch, dim, seqlen, dstate;
  int64_t groups;          // of channels that share B and C; 1 where both are constant
  int64_t group_channels;  // dim / groups
  int64_t parts;           // pieces of a group, one work item each per image
  int64_t part_channels;   // channels of a piece (the last may be shorter), so that piece p starts at p *
                           // part_channels
  int64_t pieces;          // stretches of tokens that keep sums of their own in the backward pass
  bool delta_softplus;
  bool constant_b, constant_c;
  View u, delta, z, out;   // (batch, dim, seqlen)
  const void* a;           // (dim, dstate)
  const void* b;           // (batch, groups, dstate, seqlen), or (dim, dstate) where constant
  const void* c;           // likewise
  const void* d;           // (dim), or null
  const void* delta_bias;  // (dim), or null
  void* last_state;        // (batch, dim, dstate)

  // The rest belongs to the backward pass.
  View dout, du, ddelta, dz;
  const void* dlast_state;  // (batch, dim, dstate), or null
  void* da;                 // (batch, pieces, dim, dstate): sums over tokens, still to be added up
  void* db;  // (batch, parts, groups, dstate, seqlen), or (batch, pieces, dim, dstate) where constant
  void* dc;  // likewise
  void* dd;  // (batch, pieces, dim), or null
  void* ddelta_bias;  // (batch, pieces, dim), or null
};

// One pass over work items [begin, end) of batch * groups * parts.
using SelectiveScanPass = void (*)(const SelectiveScanArgs& args, int64_t begin, int64_t end, void* scratch);

// A scan of few channels, divided along its tokens. A piece is known by the states that it leaves when it
// starts from zero and by the sum of its steps, which gives their decay; these of all pieces are carried one
// to the next, and every piece is then run from the states before it.
struct DividedScanArgs {
  const SelectiveScanArgs* scan;
  int64_t tokens, pieces;  // of a piece, a multiple of kBackwardTokens (the last may be shorter); how many
  int64_t block, blocks;   // pieces that a work item of the forward pass runs; how many of these there are
  void* states;            // (batch, pieces + 1, dim, dstate): before each piece, and after the last
  void* steps;             // (batch, pieces, dim): their sum over a piece
  void* gradients;  // (batch, pieces, dim, dstate): of the states after each piece; null in the forward pass
};

// One pass over work items [begin, end), each a block of pieces of a work item of the undivided scan; over
// these themselves in `carry`.
using DividedScanPass = void (*)(const DividedScanArgs& args, int64_t begin, int64_t end, void* scratch);

struct DividedScanKernels {
  DividedScanPass first, carry, second;  // of the forward pass
  DividedScanPass outline, carry_both, backward;
};

// Several routes over the tokens of one input, whose outputs are added up.
struct RoutedScanArgs {
  int64_t routes;
  bool shared;                     // u and du are the same tensors in every route
  const SelectiveScanArgs* route;  // sizes, u, delta, parameters and their gradients of each; z, out, dout
                                   // and dz are those of the first. b and c are in the order of the route
  const int64_t* code;             // bit 0: column by column, bit 1: from the end
  const int64_t* columns;          // the pixels column by column, (seqlen); null where no route needs them
};

using RoutedScanPass = void (*)(const RoutedScanArgs& args, int64_t begin, int64_t end, void* scratch);

// A routed scan of few channels, divided along the tokens of each route. Its passes run over tiles of
// channels, one of each of some work items, which stay in lanes for all tokens from the first pass to the
// last.
struct DividedRoutesArgs {
  const RoutedScanArgs* routed;
  const DividedScanArgs* divided;  // of each route
  int64_t item, items;             // work items [item, item + items) of the undivided scan
  int64_t channel;                 // of each item, where its tile starts
  int64_t route, at_once;  // the routes that a pass runs, from the first of them; one in the backward pass
  void* planes;            // (planes, items, seqlen) vectors
};

// One pass over work [begin, end), for each tile: each piece in `load`, `add`, `exchange`, `outline` and
// `backward`; each route in `carry`, each of its blocks but one, or the only one, in `first` and `second`;
// the tile itself in `carry_both`.
using DividedRoutesPass = void (*)(const DividedRoutesArgs& args, int64_t begin, int64_t end, void* scratch);

struct DividedRoutesKernels {
  int64_t lanes;                                      // channels of a tile
  DividedRoutesPass load, first, carry, second, add;  // of the forward pass
  DividedRoutesPass exchange, outline, carry_both, backward;
};

struct SelectiveScanKernels {
  SelectiveScanPass forward_f32, forward_f64, backward_f32, backward_f64;
  RoutedScanPass routed_forward_f32, routed_forward_f64, routed_backward_f32, routed_backward_f64;
  DividedScanKernels divided_f32, divided_f64;
  DividedRoutesKernels divided_routes_f32, divided_routes_f64;
  // The bare loop that the scan is measured against: for each work item the decays of 64 tokens, 16 states
  // and a vector of channels, written over and over to the same 64 vectors. Returns the exponentials of one
  // item.
  int64_t (*exponentials)(int64_t begin, int64_t end, void* scratch);
};

constexpr size_t kExponentialsScratch = 64 * (2 * 64 + 16);

extern const SelectiveScanKernels selective_scan_baseline, selective_scan_avx2, selective_scan_avx512;

constexpr int64_t kForwardTokens = 64;    // tokens a forward pass keeps in L1 for one tile of channels
constexpr int64_t kBackwardTokens = 256;  // tokens whose states a backward pass keeps at once

// Bytes a thread needs, for the widest vectors (64 bytes).
inline size_t selective_scan_forward_scratch(int64_t dstate) {
  return 64 * (4 * size_t(kForwardTokens + 2) + 4 * size_t(dstate));
}
inline size_t selective_scan_backward_scratch(int64_t dstate, int64_t seqlen) {
  const size_t chunks = size_t(seqlen + kBackwardTokens - 1) / size_t(kBackwardTokens);
  return 64 * (17 * size_t(kBackwardTokens + 1) + (7 + chunks) * size_t(dstate));
}

// The tensors of which a routed pass holds a tile of whole rows, running `at_once` routes.
inline int64_t routed_scan_forward_planes(bool shared, int64_t at_once) {
  return 1 + at_once + (shared ? 1 : at_once);
}
constexpr int64_t kRoutedBackwardPlanes = 6;

inline size_t routed_scan_forward_scratch(int64_t dstate, int64_t seqlen) {
  return selective_scan_forward_scratch(dstate) + 64 * 3 * size_t(seqlen);
}
inline size_t routed_scan_backward_scratch(int64_t dstate, int64_t seqlen) {
  return selective_scan_backward_scratch(dstate, seqlen) + 64 * size_t(kRoutedBackwardPlanes * seqlen);
}

}  // namespace vitzoo
