// Several routes over the tokens of one input, summed into one output. A tile of channels is held in lanes
// for all tokens in the order of the image; a route gathers whole vectors from it, in its own order. See
// README.md.
#pragma once

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace {

using vitzoo::RoutedScanArgs;

// Where the tokens of one route lie in the image.
struct Route {
  const int64_t* columns;  // pixels column by column; null for rows
  int64_t last;            // L - 1 for a route from the end; -1 otherwise

  Route(const RoutedScanArgs& k, int64_t r)
      : columns(k.code[r] & 1 ? k.columns : nullptr), last(k.code[r] & 2 ? k.route[r].seqlen - 1 : -1) {}

  VITZOO_INLINE int64_t operator()(int64_t t) const {
    t = last < 0 ? t : last - t;
    return columns == nullptr ? t : columns[t];
  }
};

template <class T>
VITZOO_INLINE void gather(const Route& route, int64_t token, int64_t count, const Vec<T>* from, Vec<T>* to) {
  for (int64_t t = 0; t < count; ++t) {
    to[t] = from[route(token + t)];
  }
}

template <class T>
VITZOO_INLINE void scatter(const Route& route, int64_t token, int64_t count, const Vec<T>* from, Vec<T>* to) {
  for (int64_t t = 0; t < count; ++t) {
    to[route(token + t)] = from[t];
  }
}

template <class T>
VITZOO_INLINE void scatter_add(const Route& route, int64_t token, int64_t count, const Vec<T>* from,
                               Vec<T>* to) {
  for (int64_t t = 0; t < count; ++t) {
    to[route(token + t)] += from[t];
  }
}

template <class T>
VITZOO_INLINE void clear(Vec<T>* p, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    p[t] = Vec<T>{};
  }
}

template <class T>
void routed_forward(const RoutedScanArgs& args, int64_t begin, int64_t end, void* scratch) {
  const SelectiveScanArgs& first = args.route[0];
  const int64_t seqlen = first.seqlen;
  const Forward<T> w(scratch, first.dstate);
  Vec<T>*const u = w.end, *const delta = u + seqlen, *const sum = delta + seqlen;
  for_tiles<T>(first, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    clear<T>(sum, seqlen);
    for (int64_t r = 0; r < args.routes; ++r) {
      const SelectiveScanArgs& k = args.route[r];
      const Route route(args, r);
      if (r == 0 || !args.shared) {
        load_tile(k.u, tile.batch, tile.channel, tile.width, 0, seqlen, u);
      }
      load_tile(k.delta, tile.batch, tile.channel, tile.width, 0, seqlen, delta);
      const Channels<T> own = begin_forward<T>(k, tile, w);
      for (int64_t token = 0; token < seqlen; token += kForwardTokens) {
        const int64_t rest = seqlen - token, count = rest < kForwardTokens ? rest : kForwardTokens;
        gather<T>(route, token, count, delta, w.s);
        gather<T>(route, token, count, u, w.x);
        forward_stretch<T, false, false, false>(k, tile, w, own, token, count,
                                                [](int64_t, int64_t) __attribute__((always_inline)) {});
        scatter_add<T>(route, token, count, w.y, sum);
      }
    }
    if (first.z.data != nullptr) {
      load_tile(first.z, tile.batch, tile.channel, tile.width, 0, seqlen, u);
      for (int64_t t = 0; t < seqlen; ++t) {
        sum[t] = sum[t] * u[t] * sigmoid<T>(u[t]);
      }
    }
    store_tile(first.out, tile.batch, tile.channel, tile.width, 0, seqlen, sum);
  });
}

template <class T>
void routed_backward(const RoutedScanArgs& args, int64_t begin, int64_t end, void* scratch) {
  const SelectiveScanArgs& first = args.route[0];
  const int64_t seqlen = first.seqlen;
  const bool gated = first.z.data != nullptr;
  const Backward<T> w(scratch, first.dstate, seqlen);
  Vec<T>*const u = w.end, *const delta = u + seqlen, *const dy = delta + seqlen, *const du = dy + seqlen,
               *const sum = du + seqlen, *const gate_slope = sum + seqlen;
  for_tiles<T>(first, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    load_tile(first.dout, tile.batch, tile.channel, tile.width, 0, seqlen, dy);
    if (gated) {
      load_tile(first.z, tile.batch, tile.channel, tile.width, 0, seqlen, gate_slope);
      open_gate<T>(gate_slope, dy, gate_slope, seqlen);
      clear<T>(sum, seqlen);
    }
    for (int64_t r = 0; r < args.routes; ++r) {
      const SelectiveScanArgs& k = args.route[r];
      const Route route(args, r);
      if (r == 0 || !args.shared) {
        load_tile(k.u, tile.batch, tile.channel, tile.width, 0, seqlen, u);
        clear<T>(du, seqlen);
      }
      load_tile(k.delta, tile.batch, tile.channel, tile.width, 0, seqlen, delta);
      ChannelSums<T> own = begin_backward<T>(k, tile, w);
      const auto load = [&](int64_t token, int64_t count) __attribute__((always_inline)) {
        gather<T>(route, token, count, delta, w.s);
        gather<T>(route, token, count, u, w.x);
      };
      find_bounds<T, false, false>(k, tile, w, own.bias, load);
      for (int64_t chunk = (seqlen - 1) / kBackwardTokens; chunk >= 0; --chunk) {
        const int64_t token = chunk * kBackwardTokens, rest = seqlen - token,
                      count = rest < kBackwardTokens ? rest : kBackwardTokens;
        load(token, count);
        gather<T>(route, token, count, dy, w.dy);
        backward_chunk<T, false, false>(k, tile, w, own, token, count, gated);
        scatter<T>(route, token, count, w.sum_qa, delta);
        scatter_add<T>(route, token, count, w.sum_gb, du);
        if (gated) {
          scatter_add<T>(route, token, count, w.y, sum);
        }
      }
      end_backward<T, false, false>(k, tile, w, own, 0);
      store_tile(k.ddelta, tile.batch, tile.channel, tile.width, 0, seqlen, delta);
      if (r + 1 == args.routes || !args.shared) {
        store_tile(k.du, tile.batch, tile.channel, tile.width, 0, seqlen, du);
      }
    }
    if (gated) {
      for (int64_t t = 0; t < seqlen; ++t) {
        sum[t] = sum[t] * gate_slope[t];
      }
      store_tile(first.dz, tile.batch, tile.channel, tile.width, 0, seqlen, sum);
    }
  });
}

}  // namespace
