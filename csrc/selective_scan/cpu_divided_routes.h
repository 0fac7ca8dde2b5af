// Routes divided along their tokens; see DividedRoutesArgs, cpu_divided.h and cpu_routed.h. The planes are
// those that a thread has of its own in an undivided scan, for all tokens of a tile in the order of the
// image: a piece of a route has pixels of its own in them.
#pragma once

#include "cpu_divided.h"
#include "cpu_routed.h"

namespace {

using vitzoo::DividedRoutesArgs;

// The tile of one of the work items, and its planes.
template <class T>
struct RoutedTile {
  const DividedRoutesArgs& args;
  Tile tile;
  int64_t item;  // in the planes

  VITZOO_INLINE Vec<T>* plane(int64_t number) const {
    return static_cast<Vec<T>*>(args.planes) + (number * args.items + item) * args.routed->route[0].seqlen;
  }

  // Of the forward pass; y of several routes at once is where delta was, that of one is added to the sum.
  VITZOO_INLINE Vec<T>* sum() const { return plane(0); }
  VITZOO_INLINE Vec<T>* y(int64_t r) const { return plane(1 + r - args.route); }
  VITZOO_INLINE Vec<T>* u(int64_t r) const {
    return plane(1 + args.at_once + (args.routed->shared ? 0 : r - args.route));
  }

  VITZOO_INLINE void load(const View& view, int64_t token, int64_t count, Vec<T>* to) const {
    load_tile(view, tile.batch, tile.channel, tile.width, token, count, to + token);
  }
  VITZOO_INLINE void store(const View& view, int64_t token, int64_t count, const Vec<T>* from) const {
    store_tile(view, tile.batch, tile.channel, tile.width, token, count, from + token);
  }
};

// Of the backward pass; the gradients of delta are where it was.
enum BackwardPlane { kU, kDelta, kDy, kDu, kSum, kGateSlope };

// Calls f(tile, number) for work [begin, end), `each` to one of the tiles.
template <class T, class F>
VITZOO_INLINE void for_routed(const DividedRoutesArgs& args, int64_t each, int64_t begin, int64_t end,
                              const F& f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / each;
    const Tile tile = tile_of<T>(args.routed->route[0], args.item + item, args.channel);
    if (tile.width > 0) {
      f(RoutedTile<T>{args, tile, item}, i % each);
    }
  }
}

// Calls f(tile, token, count) for stretches of pixels, as many as there are pieces.
template <class T, class F>
VITZOO_INLINE void for_pixels(const DividedRoutesArgs& args, int64_t begin, int64_t end, const F& f) {
  const int64_t tokens = args.divided[0].tokens, seqlen = args.routed->route[0].seqlen;
  for_routed<T>(args, args.divided[0].pieces, begin, end,
                [&](const RoutedTile<T>& at, int64_t number) __attribute__((always_inline)) {
                  const int64_t token = number * tokens, rest = seqlen - token;
                  f(at, token, rest < tokens ? rest : tokens);
                });
}

template <class T>
void routes_load(const DividedRoutesArgs& args, int64_t begin, int64_t end, void*) {
  for_pixels<T>(args, begin, end,
                [&](const RoutedTile<T>& at, int64_t token, int64_t count) __attribute__((always_inline)) {
                  if (args.route == 0) {
                    clear<T>(at.sum() + token, count);
                  }
                  for (int64_t r = args.route; r < args.route + args.at_once; ++r) {
                    const SelectiveScanArgs& k = args.routed->route[r];
                    if (r == 0 || !args.routed->shared) {
                      at.load(k.u, token, count, at.u(r));
                    }
                    at.load(k.delta, token, count, at.y(r));
                  }
                });
}

template <class T>
void run_route(const RoutedTile<T>& at, int64_t r, const Forward<T>& w, int64_t first, int64_t last) {
  const DividedScanArgs& d = at.args.divided[r];
  const Route route(*at.args.routed, r);
  const Vec<T>* const u = at.u(r);
  Vec<T>* const y = at.y(r);
  run_block<T>(d, at.tile, w, first, last < d.pieces ? last : d.pieces,
               [&](const Channels<T>& own, int64_t token, int64_t count) __attribute__((always_inline)) {
                 gather<T>(route, token, count, y, w.s);
                 gather<T>(route, token, count, u, w.x);
                 forward_stretch<T, false, false, true>(*d.scan, at.tile, w, own, token, count,
                                                        [](int64_t, int64_t)
                                                            __attribute__((always_inline)) {});
                 if (at.args.at_once == 1) {
                   scatter_add<T>(route, token, count, w.y, at.sum());
                 } else {
                   scatter<T>(route, token, count, w.y, y);
                 }
               });
}

template <class T>
void outline_route(const RoutedTile<T>& at, int64_t r, const Backward<T>& w, int64_t piece, const Vec<T>* u,
                   const Vec<T>* delta, const Vec<T>* dy) {
  const Route route(*at.args.routed, r);
  outline_piece<T>(
      at.args.divided[r], at.tile, w, piece,
      [&](int64_t token, int64_t count) __attribute__((always_inline)) {
        gather<T>(route, token, count, delta, w.s);
        gather<T>(route, token, count, u, w.x);
      },
      [&](int64_t token, int64_t count)
          __attribute__((always_inline)) { gather<T>(route, token, count, dy, w.dy); });
}

// The first block of every route, and an outline of all others but the last.
template <class T>
void routes_first(const DividedRoutesArgs& args, int64_t begin, int64_t end, void* scratch) {
  const DividedScanArgs& d = args.divided[0];
  const Forward<T> w(scratch, d.scan->dstate);
  const Backward<T> outline(scratch, d.scan->dstate, 0);
  const int64_t each = d.blocks > 1 ? d.blocks - 1 : 1;
  for_routed<T>(args, args.at_once * each, begin, end,
                [&](const RoutedTile<T>& at, int64_t number) __attribute__((always_inline)) {
                  const int64_t r = args.route + number / each, i = number % each;
                  if (i == 0) {
                    run_route<T>(at, r, w, 0, d.block);
                  } else {
                    for (int64_t piece = i * d.block; piece < (i + 1) * d.block; ++piece) {
                      outline_route<T>(at, r, outline, piece, at.u(r), at.y(r), nullptr);
                    }
                  }
                });
}

template <class T>
void routes_carry(const DividedRoutesArgs& args, int64_t begin, int64_t end, void*) {
  for_routed<T>(args, args.at_once, begin, end,
                [&](const RoutedTile<T>& at, int64_t number) __attribute__((always_inline)) {
                  const DividedScanArgs& d = args.divided[args.route + number];
                  carry_states<T>(d, at.tile, d.block, (d.blocks - 1) * d.block);
                });
}

template <class T>
void routes_second(const DividedRoutesArgs& args, int64_t begin, int64_t end, void* scratch) {
  const DividedScanArgs& d = args.divided[0];
  const Forward<T> w(scratch, d.scan->dstate);
  const int64_t each = d.blocks - 1;
  for_routed<T>(args, args.at_once * each, begin, end,
                [&](const RoutedTile<T>& at, int64_t number) __attribute__((always_inline)) {
                  const int64_t i = number % each + 1;
                  run_route<T>(at, args.route + number / each, w, i * d.block, (i + 1) * d.block);
                });
}

// The sum of routes run at once, gated and stored after the last of them.
template <class T>
void routes_add(const DividedRoutesArgs& args, int64_t begin, int64_t end, void*) {
  const SelectiveScanArgs& first = args.routed->route[0];
  for_pixels<T>(args, begin, end,
                [&](const RoutedTile<T>& at, int64_t token, int64_t count) __attribute__((always_inline)) {
                  Vec<T>* const sum = at.sum();
                  for (int64_t r = args.route; args.at_once > 1 && r < args.route + args.at_once; ++r) {
                    const Vec<T>* const y = at.y(r);
                    for (int64_t t = token; t < token + count; ++t) {
                      sum[t] += y[t];
                    }
                  }
                  if (args.route + args.at_once < args.routed->routes) {
                    return;
                  }
                  if (first.z.data != nullptr) {
                    Vec<T>* const z = at.y(args.route);
                    at.load(first.z, token, count, z);
                    for (int64_t t = token; t < token + count; ++t) {
                      sum[t] = sum[t] * z[t] * sigmoid<T>(z[t]);
                    }
                  }
                  at.store(first.out, token, count, sum);
                });
}

// From one route to the next: the gradients of that before args.route are stored, its own inputs are loaded.
template <class T>
void routes_exchange(const DividedRoutesArgs& args, int64_t begin, int64_t end, void*) {
  const RoutedScanArgs& routed = *args.routed;
  const SelectiveScanArgs& first = routed.route[0];
  const bool gated = first.z.data != nullptr, ends = args.route == routed.routes;
  for_pixels<T>(args, begin, end,
                [&](const RoutedTile<T>& at, int64_t token, int64_t count) __attribute__((always_inline)) {
                  Vec<T>*const du = at.plane(kDu), *const dy = at.plane(kDy), *const sum = at.plane(kSum),
                               *const gate_slope = at.plane(kGateSlope);
                  if (args.route > 0) {
                    const SelectiveScanArgs& before = routed.route[args.route - 1];
                    at.store(before.ddelta, token, count, at.plane(kDelta));
                    if (ends || !routed.shared) {
                      at.store(before.du, token, count, du);
                    }
                  } else {
                    at.load(first.dout, token, count, dy);
                    if (gated) {
                      at.load(first.z, token, count, gate_slope);
                      open_gate<T>(gate_slope + token, dy + token, gate_slope + token, count);
                      clear<T>(sum + token, count);
                    }
                  }
                  if (ends) {
                    for (int64_t t = token; gated && t < token + count; ++t) {
                      sum[t] = sum[t] * gate_slope[t];
                    }
                    if (gated) {
                      at.store(first.dz, token, count, sum);
                    }
                    return;
                  }
                  const SelectiveScanArgs& k = routed.route[args.route];
                  if (args.route == 0 || !routed.shared) {
                    at.load(k.u, token, count, at.plane(kU));
                    clear<T>(du + token, count);
                  }
                  at.load(k.delta, token, count, at.plane(kDelta));
                });
}

template <class T>
void routes_outline(const DividedRoutesArgs& args, int64_t begin, int64_t end, void* scratch) {
  const Backward<T> w(scratch, args.routed->route[0].dstate, 0);
  for_routed<T>(args, args.divided[0].pieces, begin, end,
                [&](const RoutedTile<T>& at, int64_t piece) __attribute__((always_inline)) {
                  outline_route<T>(at, args.route, w, piece, at.plane(kU), at.plane(kDelta), at.plane(kDy));
                });
}

template <class T>
void routes_carry_both(const DividedRoutesArgs& args, int64_t begin, int64_t end, void*) {
  for_routed<T>(args, 1, begin, end, [&](const RoutedTile<T>& at, int64_t) __attribute__((always_inline)) {
    carry_both<T>(args.divided[args.route], at.tile);
  });
}

template <class T>
void routes_backward(const DividedRoutesArgs& args, int64_t begin, int64_t end, void* scratch) {
  const DividedScanArgs& d = args.divided[args.route];
  const SelectiveScanArgs& k = *d.scan;
  const bool gated = args.routed->route[0].z.data != nullptr;
  const Route route(*args.routed, args.route);
  const Backward<T> w(scratch, k.dstate, k.seqlen);
  for_routed<T>(args, d.pieces, begin, end,
                [&](const RoutedTile<T>& at, int64_t piece) __attribute__((always_inline)) {
                  const int64_t token = piece * kBackwardTokens, rest = k.seqlen - token,
                                count = rest < kBackwardTokens ? rest : kBackwardTokens;
                  gather<T>(route, token, count, at.plane(kDelta), w.s);
                  gather<T>(route, token, count, at.plane(kU), w.x);
                  gather<T>(route, token, count, at.plane(kDy), w.dy);
                  run_piece<T>(d, at.tile, w, piece, [&](ChannelSums<T>& own) __attribute__((always_inline)) {
                    backward_chunk<T, false, false>(k, at.tile, w, own, token, count, gated);
                  });
                  scatter<T>(route, token, count, w.sum_qa, at.plane(kDelta));
                  scatter_add<T>(route, token, count, w.sum_gb, at.plane(kDu));
                  if (gated) {
                    scatter_add<T>(route, token, count, w.y, at.plane(kSum));
                  }
                });
}

template <class T>
constexpr vitzoo::DividedRoutesKernels kDividedRoutes = {
    Simd<T>::W,    routes_load<T>,     routes_first<T>,   routes_carry<T>,      routes_second<T>,
    routes_add<T>, routes_exchange<T>, routes_outline<T>, routes_carry_both<T>, routes_backward<T>};

}  // namespace
