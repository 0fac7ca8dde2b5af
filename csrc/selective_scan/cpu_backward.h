// The backward pass of one scan; see cpu_kernel.h.
#pragma once

#include "cpu_kernel.h"

namespace {

// States that a sweep takes at once.
constexpr int kSweepStates = kRegisters / 8;

// Scratch of the backward pass: what it keeps of a chunk of tokens, and of each state.
template <class T>
struct Backward {
  Vec<T>*s, *drive, *slope, *x, *dy, *y, *gate_slope, *sum_gb, *sum_qa, *h[kSweepStates], *a[kSweepStates];
  Vec<T>*rate, *rate2, *state, *carry, *da, *db, *dc, *bounds, *end;

  Backward(void* scratch, int64_t dstate, int64_t seqlen) {
    Vec<T>* p = static_cast<Vec<T>*>(scratch);
    Vec<T>** const by_token[] = {&s, &drive, &slope, &x, &dy, &y, &gate_slope, &sum_gb, &sum_qa};
    for (Vec<T>** field : by_token) {
      *field = p;
      p += kBackwardTokens + 1;  // h holds the state before the chunk too
    }
    for (int i = 0; i < kSweepStates; ++i) {
      h[i] = p;
      a[i] = p + (kBackwardTokens + 1);
      p += 2 * (kBackwardTokens + 1);
    }
    Vec<T>** const by_state[] = {&rate, &rate2, &state, &carry, &da, &db, &dc};
    for (Vec<T>** field : by_state) {
      *field = p;
      p += dstate;
    }
    bounds = p;
    end = p + ((seqlen + kBackwardTokens - 1) / kBackwardTokens) * dstate;
  }
};

// Adds to (or writes) a row over tokens the sums over the lanes of product(t).
template <class T, class F>
VITZOO_INLINE void add_lane_sums(T* row, int64_t count, bool write, const F& product) {
  constexpr int W = Simd<T>::W;
  for (int64_t t = 0; t < count; t += W) {
    const int columns = count - t < W ? int(count - t) : W;
    Vec<T> v[W];
    if (columns == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        v[i] = product(t + i);
      }
    } else {
      for (int i = 0; i < W; ++i) {
        v[i] = i < columns ? product(t + i) : Vec<T>{};
      }
    }
    const Vec<T> sums = sum_lanes<T, 1>(v);
    store_row<T>(row + t, write ? sums : sums + load_row<T>(row + t, columns), columns);
  }
}

// Both sweeps of NU states over one chunk: states forward, then their gradients backward.
template <class T, int NU, bool Clamp, bool CB, bool CC>
VITZOO_INLINE void sweep(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w, int64_t n,
                         int64_t token, int64_t count, const Vec<T>* start, bool want_y) {
  typedef Vec<T> V;
  Row<T, CB> b[NU];
  Row<T, CC> c[NU];
  V state[NU], rate[NU];
#pragma GCC unroll 4
  for (int i = 0; i < NU; ++i) {
    b[i] = row_of<T, CB>(k.b, k, tile, n + i, token);
    c[i] = row_of<T, CC>(k.c, k, tile, n + i, token);
    state[i] = start[n + i];
    rate[i] = w.rate2[n + i];
    w.h[i][0] = state[i];
  }
  for (int64_t t = 0; t < count; ++t) {
    V sum = w.y[t];
#pragma GCC unroll 4
    for (int i = 0; i < NU; ++i) {
      const V a = exp2_product<T, Clamp>(w.s[t], rate[i]);
      state[i] = a * state[i] + w.drive[t] * b[i].at(t);
      w.a[i][t] = a;
      w.h[i][t + 1] = state[i];
      if (want_y) {
        sum += state[i] * c[i].at(t);
      }
    }
    if (want_y) {
      w.y[t] = sum;
    }
  }
  V carry[NU], da[NU];
#pragma GCC unroll 4
  for (int i = 0; i < NU; ++i) {
    carry[i] = w.carry[n + i];
    da[i] = w.da[n + i];
    rate[i] = w.rate[n + i];
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    V sum_gb = w.sum_gb[t], sum_qa = w.sum_qa[t];
#pragma GCC unroll 4
    for (int i = 0; i < NU; ++i) {
      const V g = w.dy[t] * c[i].at(t) + carry[i];
      carry[i] = g * w.a[i][t];
      const V q = carry[i] * w.h[i][t];
      da[i] += q * w.s[t];
      sum_qa += q * rate[i];
      sum_gb += g * b[i].at(t);
      w.a[i][t] = g;
    }
    w.sum_gb[t] = sum_gb;
    w.sum_qa[t] = sum_qa;
  }
  const int64_t row =
      (((tile.batch * k.parts + tile.part) * k.groups + tile.group) * k.dstate + n) * k.seqlen + token;
#pragma GCC unroll 4
  for (int i = 0; i < NU; ++i) {
    w.carry[n + i] = carry[i];
    w.da[n + i] = da[i];
    const V *const g = w.a[i], *const h = w.h[i] + 1;
    if constexpr (CB) {
      V sum = w.db[n + i];
      for (int64_t t = 0; t < count; ++t) {
        sum += g[t] * w.drive[t];
      }
      w.db[n + i] = sum;
    } else {
      add_lane_sums<T>(static_cast<T*>(k.db) + row + i * k.seqlen, count, tile.first_of_part,
                       [&](int64_t t) __attribute__((always_inline)) { return g[t] * w.drive[t]; });
    }
    if constexpr (CC) {
      V sum = w.dc[n + i];
      for (int64_t t = 0; t < count; ++t) {
        sum += h[t] * w.dy[t];
      }
      w.dc[n + i] = sum;
    } else {
      add_lane_sums<T>(static_cast<T*>(k.dc) + row + i * k.seqlen, count, tile.first_of_part,
                       [&](int64_t t) __attribute__((always_inline)) { return h[t] * w.dy[t]; });
    }
  }
}

template <class T, bool Clamp, bool CB, bool CC>
VITZOO_INLINE void sweep_all(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                             int64_t token, int64_t count, const Vec<T>* start, bool want_y) {
  int64_t n = 0;
  for (; n + kSweepStates <= k.dstate; n += kSweepStates) {
    sweep<T, kSweepStates, Clamp, CB, CC>(k, tile, w, n, token, count, start, want_y);
  }
  for (; n < k.dstate; ++n) {
    sweep<T, 1, Clamp, CB, CC>(k, tile, w, n, token, count, start, want_y);
  }
}

// The states at the start of every chunk, by running over all but the last; load(token, count) brings delta
// and u to w.s and w.x.
template <class T, bool CB, bool CC, class F>
VITZOO_INLINE void find_bounds(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                               Vec<T> bias, const F& load) {
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.state[n] = w.bounds[n] = Vec<T>{};
  }
  for (int64_t token = 0; token + kBackwardTokens < k.seqlen; token += kBackwardTokens) {
    load(token, kBackwardTokens);
    make_steps<T>(k, bias, w.s, nullptr, kBackwardTokens);
    for (int64_t t = 0; t < kBackwardTokens; ++t) {
      w.drive[t] = w.s[t] * w.x[t];
      w.y[t] = Vec<T>{};
    }
    advance_all<T, true, CB, CC, false>(k, tile, token, kBackwardTokens, w.s, w.drive, w.rate2, w.state,
                                        nullptr, w.y, [](int64_t, int64_t) __attribute__((always_inline)) {});
    Vec<T>* const next = w.bounds + (token / kBackwardTokens + 1) * k.dstate;
    for (int64_t n = 0; n < k.dstate; ++n) {
      next[n] = w.state[n];
    }
  }
}

// A tile's own constants, and its sums over the tokens.
template <class T>
struct ChannelSums {
  Vec<T> bias, skip, fastest, dskip, dbias;
};

template <class T>
VITZOO_INLINE ChannelSums<T> begin_backward(const SelectiveScanArgs& k, const Tile& tile,
                                            const Backward<T>& w) {
  ChannelSums<T> own{load_lanes<T>(k.delta_bias, tile, 1, 0), load_lanes<T>(k.d, tile, 1, 0), Vec<T>{},
                     Vec<T>{}, Vec<T>{}};
  const T* const dlast = k.dlast_state == nullptr
                             ? nullptr
                             : static_cast<const T*>(k.dlast_state) + tile.batch * k.dim * k.dstate;
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.rate[n] = load_lanes<T>(k.a, tile, k.dstate, n);
    w.rate2[n] = w.rate[n] * T(kLog2e);
    own.fastest = larger(own.fastest, absolute<T>(w.rate2[n]));
    w.carry[n] = load_lanes<T>(dlast, tile, k.dstate, n);
    w.da[n] = w.db[n] = w.dc[n] = Vec<T>{};
  }
  return own;
}

// From delta, u and the gradient of y in w.s, w.x and w.dy to the gradients of delta and u in w.sum_qa and
// w.sum_gb and, if wanted, y in w.y.
template <class T, bool CB, bool CC>
VITZOO_INLINE void backward_chunk(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                                  ChannelSums<T>& own, int64_t token, int64_t count, bool want_y) {
  make_steps<T>(k, own.bias, w.s, w.slope, count);
  for (int64_t t = 0; t < count; ++t) {
    w.drive[t] = w.s[t] * w.x[t];
    w.y[t] = own.skip * w.x[t];
    w.sum_gb[t] = w.sum_qa[t] = Vec<T>{};
  }
  const Vec<T>* const start = w.bounds + token / kBackwardTokens * k.dstate;
  if (exponents_are_plain<T>(w.s, count, own.fastest)) {
    sweep_all<T, false, CB, CC>(k, tile, w, token, count, start, want_y);
  } else {
    sweep_all<T, true, CB, CC>(k, tile, w, token, count, start, want_y);
  }
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> ddelta = w.x[t] * w.sum_gb[t] + w.sum_qa[t];
    if (k.delta_softplus) {
      ddelta = ddelta * w.slope[t];
    }
    own.dbias += ddelta;
    own.dskip += w.dy[t] * w.x[t];
    w.sum_qa[t] = ddelta;
    w.sum_gb[t] = w.s[t] * w.sum_gb[t] + own.skip * w.dy[t];
  }
}

template <class T, bool CB, bool CC>
VITZOO_INLINE void end_backward(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                                const ChannelSums<T>& own, int64_t piece) {
  const int64_t channels = (tile.batch * k.pieces + piece) * k.dim, states = channels * k.dstate;
  for (int64_t n = 0; n < k.dstate; ++n) {
    store_lanes<T>(static_cast<T*>(k.da) + states, tile, k.dstate, n, w.da[n]);
    if constexpr (CB) {
      store_lanes<T>(static_cast<T*>(k.db) + states, tile, k.dstate, n, w.db[n]);
    }
    if constexpr (CC) {
      store_lanes<T>(static_cast<T*>(k.dc) + states, tile, k.dstate, n, w.dc[n]);
    }
  }
  if (k.dd != nullptr) {
    store_lanes<T>(static_cast<T*>(k.dd) + channels, tile, 1, 0, own.dskip);
  }
  if (k.ddelta_bias != nullptr) {
    store_lanes<T>(static_cast<T*>(k.ddelta_bias) + channels, tile, 1, 0, own.dbias);
  }
}

// The gradient of y in place of that of out, and what y is to be multiplied by for the gradient of z; `slope`
// may be where z is.
template <class T>
VITZOO_INLINE void open_gate(const Vec<T>* z, Vec<T>* dout, Vec<T>* slope, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const Vec<T> x = z[t], gate = sigmoid<T>(x), half = dout[t] * gate;
    slope[t] = half * (x * (T(1) - gate) + T(1));
    dout[t] = half * x;
  }
}

// The gradients of a chunk of tokens that holds the states before it in w.bounds and the gradient of those
// after it in w.carry.
template <class T, bool CB, bool CC>
VITZOO_INLINE void run_chunk(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                             ChannelSums<T>& own, int64_t chunk) {
  const bool gated = k.z.data != nullptr;
  const int64_t token = chunk * kBackwardTokens, rest = k.seqlen - token,
                count = rest < kBackwardTokens ? rest : kBackwardTokens;
  load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, w.s);
  load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, w.x);
  load_tile(k.dout, tile.batch, tile.channel, tile.width, token, count, w.dy);
  if (gated) {
    load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, w.gate_slope);
    open_gate<T>(w.gate_slope, w.dy, w.gate_slope, count);
  }
  backward_chunk<T, CB, CC>(k, tile, w, own, token, count, gated);
  store_tile(k.du, tile.batch, tile.channel, tile.width, token, count, w.sum_gb);
  store_tile(k.ddelta, tile.batch, tile.channel, tile.width, token, count, w.sum_qa);
  if (gated) {
    for (int64_t t = 0; t < count; ++t) {
      w.y[t] = w.y[t] * w.gate_slope[t];
    }
    store_tile(k.dz, tile.batch, tile.channel, tile.width, token, count, w.y);
  }
}

template <class T, bool CB, bool CC>
inline void backward_pass(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  const Backward<T> w(scratch, k.dstate, k.seqlen);
  for_tiles<T>(k, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    ChannelSums<T> own = begin_backward<T>(k, tile, w);
    find_bounds<T, CB, CC>(k, tile, w, own.bias,
                           [&](int64_t token, int64_t count) __attribute__((always_inline)) {
                             load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, w.s);
                             load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, w.x);
                           });
    for (int64_t chunk = (k.seqlen - 1) / kBackwardTokens; chunk >= 0; --chunk) {
      run_chunk<T, CB, CC>(k, tile, w, own, chunk);
    }
    end_backward<T, CB, CC>(k, tile, w, own, 0);
  });
}

}  // namespace
