// The forward pass of one scan; see cpu_kernel.h.
#pragma once

#include "cpu_kernel.h"

namespace {

// What the forward pass reads after a stretch of tokens, in this tile or the next, and what it writes at its
// end.
template <class T>
struct Ahead {
  const SelectiveScanArgs& k;
  const Tile &tile, next;
  int64_t token, count, next_token, next_count;

  VITZOO_INLINE void prefetch(int64_t part, int64_t parts) const {
    if (next.batch < k.batch) {
      const View* const views[] = {&k.delta, &k.u, &k.z};
      for (const View* view : views) {
        prefetch_tile<0>(*view, next.batch, next.channel, next.width, next_token, next_count, part, parts);
      }
    }
    prefetch_tile<1>(k.out, tile.batch, tile.channel, tile.width, token, count, part, parts);
  }
};

template <class T>
VITZOO_INLINE Ahead<T> look_ahead(const SelectiveScanArgs& k, const Tile& tile, int64_t token,
                                  int64_t count) {
  constexpr int W = Simd<T>::W;
  Tile next = tile;
  int64_t next_token = token + count;
  if (next_token >= k.seqlen) {
    next_token = 0;
    next.channel += W;
    if (next.channel >= k.dim) {
      next.channel = 0;
      ++next.batch;
    }
    next.width = k.dim - next.channel < W ? int(k.dim - next.channel) : W;
  }
  const int64_t rest = k.seqlen - next_token;
  return {k, tile, next, token, count, next_token, rest < kForwardTokens ? rest : kForwardTokens};
}

// Steps in place of delta, the drive and what the skip adds to y, for a stretch of tokens; returns the
// largest step of each lane.
template <class T, bool WithSoftplus>
VITZOO_INLINE Vec<T> prepare(int64_t count, Vec<T> bias, Vec<T> skip, Vec<T>* s, const Vec<T>* x,
                             Vec<T>* drive, Vec<T>* y) {
  Vec<T> largest{};
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> step = s[t] + bias;
    if constexpr (WithSoftplus) {
      step = softplus<T>(step).value;
    }
    largest = larger(largest, absolute<T>(step));
    s[t] = step;
    drive[t] = step * x[t];
    y[t] = skip * x[t];
  }
  return largest;
}

// Scratch of the forward pass: a stretch of tokens, and the states.
template <class T>
struct Forward {
  Vec<T>*s, *drive, *y, *x, *h, *local, *before, *a2, *end;

  Forward(void* scratch, int64_t dstate) {
    constexpr int64_t stride =
        kForwardTokens + 2;  // no power of two: loads must not look like the stores of another row
    s = static_cast<Vec<T>*>(scratch);
    drive = s + stride;
    y = drive + stride;
    x = y + stride;
    h = x + stride;
    local = h + dstate;
    before = local + dstate;
    a2 = before + dstate;
    end = a2 + dstate;
  }
};

// A tile's own constants; the states at zero.
template <class T>
struct Channels {
  Vec<T> bias, skip, fastest;
};

template <class T>
VITZOO_INLINE Channels<T> begin_forward(const SelectiveScanArgs& k, const Tile& tile, const Forward<T>& w) {
  Channels<T> own{load_lanes<T>(k.delta_bias, tile, 1, 0), load_lanes<T>(k.d, tile, 1, 0), Vec<T>{}};
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.a2[n] = load_lanes<T>(k.a, tile, k.dstate, n) * T(kLog2e);
    own.fastest = larger(own.fastest, absolute<T>(w.a2[n]));
    w.h[n] = Vec<T>{};
  }
  return own;
}

// From delta and u in w.s and w.x to y, without the gate, in w.y.
template <class T, bool CB, bool CC, bool Divided, class F>
VITZOO_INLINE void forward_stretch(const SelectiveScanArgs& k, const Tile& tile, const Forward<T>& w,
                                   const Channels<T>& own, int64_t token, int64_t count, const F& before) {
  const Vec<T> largest = k.delta_softplus
                             ? prepare<T, true>(count, own.bias, own.skip, w.s, w.x, w.drive, w.y)
                             : prepare<T, false>(count, own.bias, own.skip, w.s, w.x, w.drive, w.y);
  if (all_below<T>(largest * own.fastest, kPlainExponent<T>)) {
    advance_all<T, false, CB, CC, Divided>(k, tile, token, count, w.s, w.drive, w.a2, w.h, w.local, w.y,
                                           before);
  } else {
    advance_all<T, true, CB, CC, Divided>(k, tile, token, count, w.s, w.drive, w.a2, w.h, w.local, w.y,
                                          before);
  }
}

// A stretch of tokens from the inputs to out; F as in advance_all.
template <class T, bool CB, bool CC, bool Divided, class F>
VITZOO_INLINE void run_stretch(const SelectiveScanArgs& k, const Tile& tile, const Forward<T>& w,
                               const Channels<T>& own, int64_t token, int64_t count, const F& before) {
  load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, w.s);
  load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, w.x);
  forward_stretch<T, CB, CC, Divided>(k, tile, w, own, token, count, before);
  if (k.z.data != nullptr) {
    load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, w.x);
    for (int64_t t = 0; t < count; ++t) {
      w.y[t] = w.y[t] * w.x[t] * sigmoid<T>(w.x[t]);
    }
  }
  store_tile(k.out, tile.batch, tile.channel, tile.width, token, count, w.y);
}

template <class T, bool CB, bool CC>
inline void forward_pass(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  const Forward<T> w(scratch, k.dstate);
  for_tiles<T>(k, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    const Channels<T> own = begin_forward<T>(k, tile, w);
    for (int64_t token = 0; token < k.seqlen; token += kForwardTokens) {
      const int64_t rest = k.seqlen - token, count = rest < kForwardTokens ? rest : kForwardTokens;
      const Ahead<T> ahead = look_ahead<T>(k, tile, token, count);
      run_stretch<T, CB, CC, false>(k, tile, w, own, token, count,
                                    [&](int64_t part, int64_t parts)
                                        __attribute__((always_inline)) { ahead.prefetch(part, parts); });
    }
    for (int64_t n = 0; n < k.dstate; ++n) {
      store_lanes<T>(static_cast<T*>(k.last_state) + tile.batch * k.dim * k.dstate, tile, k.dstate, n,
                     w.h[n]);
    }
  });
}

}  // namespace
