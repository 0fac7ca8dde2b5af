// Selective scan, forward and backward, for one instruction set. A tile is W channels, one a lane. Within a
// stretch of tokens the loop over the state stands outside and the loop over tokens inside: a state and its
// row of A stay in registers, B and C are read along their contiguous rows, and the exponentials of different
// tokens overlap.
//
// Legend: s step after bias and softplus, x = u, drive = s x, h state, g gradient of h, a = exp(s A).
#pragma once

#include "../common/simd.h"
#include "cpu_args.h"

namespace {

using vitzoo::kBackwardTokens;
using vitzoo::kForwardTokens;
using vitzoo::SelectiveScanArgs;

// B or C of one state: a row over tokens shared by the lanes, or a constant of each lane.
template <class T, bool Constant>
struct Row;

template <class T>
struct Row<T, false> {
  const T* p;
  VITZOO_INLINE T at(int64_t t) const { return p[t]; }
};

template <class T>
struct Row<T, true> {
  Vec<T> v;
  VITZOO_INLINE Vec<T> at(int64_t) const { return v; }
};

struct Tile {
  int64_t batch, group, part, channel;
  int width;
  bool first_of_part;
};

template <class T>
VITZOO_INLINE Vec<T> load_lanes(const void* base, const Tile& tile, int64_t stride, int64_t offset) {
  constexpr int W = Simd<T>::W;
  Vec<T> out{};
  if (base != nullptr) {
    T values[W] = {};
    const T* const p = static_cast<const T*>(base) + tile.channel * stride + offset;
    for (int r = 0; r < tile.width; ++r) {
      values[r] = p[r * stride];
    }
    __builtin_memcpy(&out, values, sizeof(out));
  }
  return out;
}

template <class T>
VITZOO_INLINE void store_lanes(void* base, const Tile& tile, int64_t stride, int64_t offset, Vec<T> v) {
  constexpr int W = Simd<T>::W;
  T values[W];
  __builtin_memcpy(values, &v, sizeof(v));
  T* const p = static_cast<T*>(base) + tile.channel * stride + offset;
  for (int r = 0; r < tile.width; ++r) {
    p[r * stride] = values[r];
  }
}

template <class T, bool Constant>
VITZOO_INLINE Row<T, Constant> row_of(const void* base, const SelectiveScanArgs& k, const Tile& tile,
                                      int64_t n, int64_t token) {
  if constexpr (Constant) {
    return {load_lanes<T>(base, tile, k.dstate, n)};
  } else {
    return {static_cast<const T*>(base) + ((tile.batch * k.groups + tile.group) * k.dstate + n) * k.seqlen +
            token};
  }
}

// Calls f(tile) for the tiles of work items [begin, end).
template <class T, class F>
VITZOO_INLINE void for_tiles(const SelectiveScanArgs& k, int64_t begin, int64_t end, const F& f) {
  constexpr int W = Simd<T>::W;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % k.parts, group = item / k.parts % k.groups, batch = item / k.parts / k.groups;
    const int64_t start = part * k.part_channels;
    const int64_t rest = k.group_channels - start;
    const int64_t count = rest < k.part_channels ? rest : k.part_channels;
    for (int64_t c = 0; c < count; c += W) {
      const Tile tile{
          batch, group, part, group * k.group_channels + start + c, count - c < W ? int(count - c) : W,
          c == 0};
      f(tile);
    }
  }
}

// Step sizes of a stretch of tokens, in place; their slope with respect to delta goes to `slope` unless null.
template <class T>
VITZOO_INLINE void make_steps(const SelectiveScanArgs& k, Vec<T> bias, Vec<T>* s, Vec<T>* slope,
                              int64_t count) {
  if (!k.delta_softplus) {
    for (int64_t t = 0; t < count; ++t) {
      s[t] = s[t] + bias;
    }
  } else if (slope == nullptr) {
    for (int64_t t = 0; t < count; ++t) {
      s[t] = softplus<T>(s[t] + bias).value;
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      const Softplus<T> result = softplus<T>(s[t] + bias);
      s[t] = result.value;
      slope[t] = result.slope;
    }
  }
}

// Whether no exponent s A of a stretch of tokens needs a clamp; `fastest` is the largest |A| log2(e) of each
// lane.
template <class T>
VITZOO_INLINE bool exponents_are_plain(const Vec<T>* s, int64_t count, Vec<T> fastest) {
  Vec<T> largest{};
  for (int64_t t = 0; t < count; ++t) {
    largest = larger(largest, absolute<T>(s[t]));
  }
  return all_below<T>(largest * fastest, kPlainExponent<T>);
}

// Advances NU states over a stretch of tokens, and adds C h to y.
template <class T, int NU, bool Clamp, bool CB, bool CC>
VITZOO_INLINE void advance(const SelectiveScanArgs& k, const Tile& tile, int64_t n, int64_t token,
                           int64_t count, const Vec<T>* s, const Vec<T>* drive, const Vec<T>* a2, Vec<T>* h,
                           Vec<T>* y) {
  Row<T, CB> b[NU];
  Row<T, CC> c[NU];
  Vec<T> state[NU], rate[NU];
#pragma GCC unroll 8
  for (int i = 0; i < NU; ++i) {
    b[i] = row_of<T, CB>(k.b, k, tile, n + i, token);
    c[i] = row_of<T, CC>(k.c, k, tile, n + i, token);
    state[i] = h[n + i];
    rate[i] = a2[n + i];
  }
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> sum = y[t];
#pragma GCC unroll 8
    for (int i = 0; i < NU; ++i) {
      state[i] = exp2_product<T, Clamp>(s[t], rate[i]) * state[i] + drive[t] * b[i].at(t);
      sum += state[i] * c[i].at(t);
    }
    y[t] = sum;
  }
#pragma GCC unroll 8
  for (int i = 0; i < NU; ++i) {
    h[n + i] = state[i];
  }
}

template <class T, bool Clamp, bool CB, bool CC>
VITZOO_INLINE void advance_all(const SelectiveScanArgs& k, const Tile& tile, int64_t token, int64_t count,
                               const Vec<T>* s, const Vec<T>* drive, const Vec<T>* a2, Vec<T>* h, Vec<T>* y) {
  int64_t n = 0;
  for (; n + 2 <= k.dstate; n += 2) {
    advance<T, 2, Clamp, CB, CC>(k, tile, n, token, count, s, drive, a2, h, y);
  }
  if (n < k.dstate) {
    advance<T, 1, Clamp, CB, CC>(k, tile, n, token, count, s, drive, a2, h, y);
  }
}

template <class T, bool CB, bool CC>
inline void forward_pass(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  typedef Vec<T> V;
  V* const s = static_cast<V*>(scratch);
  constexpr int64_t stride =
      kForwardTokens + 2;  // no power of two: loads must not look like the stores of another row
  V* const drive = s + stride;
  V* const y = drive + stride;
  V* const x = y + stride;
  V* const h = x + stride;
  V* const a2 = h + k.dstate;
  for_tiles<T>(k, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    const V bias = load_lanes<T>(k.delta_bias, tile, 1, 0), skip = load_lanes<T>(k.d, tile, 1, 0);
    V fastest{};
    for (int64_t n = 0; n < k.dstate; ++n) {
      a2[n] = load_lanes<T>(k.a, tile, k.dstate, n) * T(kLog2e);
      fastest = larger(fastest, absolute<T>(a2[n]));
      h[n] = V{};
    }
    for (int64_t token = 0; token < k.seqlen; token += kForwardTokens) {
      const int64_t rest = k.seqlen - token, count = rest < kForwardTokens ? rest : kForwardTokens;
      load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, s);
      load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, x);
      make_steps<T>(k, bias, s, nullptr, count);
      for (int64_t t = 0; t < count; ++t) {
        drive[t] = s[t] * x[t];
        y[t] = skip * x[t];
      }
      if (exponents_are_plain<T>(s, count, fastest)) {
        advance_all<T, false, CB, CC>(k, tile, token, count, s, drive, a2, h, y);
      } else {
        advance_all<T, true, CB, CC>(k, tile, token, count, s, drive, a2, h, y);
      }
      if (k.z.data != nullptr) {
        load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, x);
        for (int64_t t = 0; t < count; ++t) {
          y[t] = y[t] * x[t] * sigmoid<T>(x[t]);
        }
      }
      store_tile(k.out, tile.batch, tile.channel, tile.width, token, count, y);
    }
    for (int64_t n = 0; n < k.dstate; ++n) {
      store_lanes<T>(static_cast<T*>(k.last_state) + tile.batch * k.dim * k.dstate, tile, k.dstate, n, h[n]);
    }
  });
}

// Scratch of the backward pass: what it keeps of a chunk of tokens, and of each state.
template <class T>
struct Backward {
  Vec<T>*s, *drive, *slope, *x, *dy, *y, *sum_gb, *sum_qa, *h[2], *a[2];
  Vec<T>*rate, *rate2, *state, *carry, *da, *db, *dc, *bounds;

  Backward(void* scratch, int64_t dstate) {
    Vec<T>* p = static_cast<Vec<T>*>(scratch);
    Vec<T>** const by_token[] = {&s,      &drive,  &slope, &x,    &dy,   &y,
                                 &sum_gb, &sum_qa, &a[0],  &a[1], &h[0], &h[1]};
    for (Vec<T>** field : by_token) {
      *field = p;
      p += kBackwardTokens + 1;  // h holds the state before the chunk too
    }
    Vec<T>** const by_state[] = {&rate, &rate2, &state, &carry, &da, &db, &dc};
    for (Vec<T>** field : by_state) {
      *field = p;
      p += dstate;
    }
    bounds = p;
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
  for (; n + 2 <= k.dstate; n += 2) {
    sweep<T, 2, Clamp, CB, CC>(k, tile, w, n, token, count, start, want_y);
  }
  if (n < k.dstate) {
    sweep<T, 1, Clamp, CB, CC>(k, tile, w, n, token, count, start, want_y);
  }
}

// The states at the start of every chunk, by running over all but the last.
template <class T, bool CB, bool CC>
VITZOO_INLINE void find_bounds(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                               Vec<T> bias) {
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.state[n] = w.bounds[n] = Vec<T>{};
  }
  for (int64_t token = 0; token + kBackwardTokens < k.seqlen; token += kBackwardTokens) {
    load_tile(k.delta, tile.batch, tile.channel, tile.width, token, kBackwardTokens, w.s);
    load_tile(k.u, tile.batch, tile.channel, tile.width, token, kBackwardTokens, w.x);
    make_steps<T>(k, bias, w.s, nullptr, kBackwardTokens);
    for (int64_t t = 0; t < kBackwardTokens; ++t) {
      w.drive[t] = w.s[t] * w.x[t];
      w.y[t] = Vec<T>{};
    }
    Vec<T>* const next = w.bounds + (token / kBackwardTokens + 1) * k.dstate;
    for (int64_t n = 0; n < k.dstate; ++n) {
      advance<T, 1, true, CB, CC>(k, tile, n, token, kBackwardTokens, w.s, w.drive, w.rate2, w.state, w.y);
      next[n] = w.state[n];
    }
  }
}

template <class T, bool CB, bool CC>
inline void backward_pass(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  typedef Vec<T> V;
  const Backward<T> w(scratch, k.dstate);
  const bool gated = k.z.data != nullptr;
  for_tiles<T>(k, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    const V bias = load_lanes<T>(k.delta_bias, tile, 1, 0), skip = load_lanes<T>(k.d, tile, 1, 0);
    const int64_t states = tile.batch * k.dim * k.dstate, channels = tile.batch * k.dim;
    V fastest{};
    for (int64_t n = 0; n < k.dstate; ++n) {
      w.rate[n] = load_lanes<T>(k.a, tile, k.dstate, n);
      w.rate2[n] = w.rate[n] * T(kLog2e);
      fastest = larger(fastest, absolute<T>(w.rate2[n]));
      w.carry[n] =
          load_lanes<T>(k.dlast_state == nullptr ? nullptr : static_cast<const T*>(k.dlast_state) + states,
                        tile, k.dstate, n);
      w.da[n] = w.db[n] = w.dc[n] = V{};
    }
    find_bounds<T, CB, CC>(k, tile, w, bias);
    V dskip{}, dbias{};
    for (int64_t chunk = (k.seqlen - 1) / kBackwardTokens; chunk >= 0; --chunk) {
      const int64_t token = chunk * kBackwardTokens, rest = k.seqlen - token,
                    count = rest < kBackwardTokens ? rest : kBackwardTokens;
      load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, w.s);
      load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, w.x);
      load_tile(k.dout, tile.batch, tile.channel, tile.width, token, count, w.dy);
      make_steps<T>(k, bias, w.s, w.slope, count);
      if (gated) {  // h[0] is free until the sweeps
        load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, w.h[0]);
        for (int64_t t = 0; t < count; ++t) {
          w.dy[t] = w.dy[t] * w.h[0][t] * sigmoid<T>(w.h[0][t]);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        w.drive[t] = w.s[t] * w.x[t];
        w.y[t] = skip * w.x[t];
        w.sum_gb[t] = w.sum_qa[t] = V{};
      }
      const V* const start = w.bounds + chunk * k.dstate;
      if (exponents_are_plain<T>(w.s, count, fastest)) {
        sweep_all<T, false, CB, CC>(k, tile, w, token, count, start, gated);
      } else {
        sweep_all<T, true, CB, CC>(k, tile, w, token, count, start, gated);
      }
      for (int64_t t = 0; t < count; ++t) {
        V ddelta = w.x[t] * w.sum_gb[t] + w.sum_qa[t];
        if (k.delta_softplus) {
          ddelta = ddelta * w.slope[t];
        }
        dbias += ddelta;
        dskip += w.dy[t] * w.x[t];
        w.sum_qa[t] = ddelta;
        w.sum_gb[t] = w.s[t] * w.sum_gb[t] + skip * w.dy[t];
      }
      store_tile(k.du, tile.batch, tile.channel, tile.width, token, count, w.sum_gb);
      store_tile(k.ddelta, tile.batch, tile.channel, tile.width, token, count, w.sum_qa);
      if (gated) {
        load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, w.h[0]);
        load_tile(k.dout, tile.batch, tile.channel, tile.width, token, count, w.dy);
        for (int64_t t = 0; t < count; ++t) {
          const V gate = sigmoid<T>(w.h[0][t]);
          w.y[t] = w.dy[t] * w.y[t] * gate * (w.h[0][t] * (T(1) - gate) + T(1));
        }
        store_tile(k.dz, tile.batch, tile.channel, tile.width, token, count, w.y);
      }
    }
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
      store_lanes<T>(static_cast<T*>(k.dd) + channels, tile, 1, 0, dskip);
    }
    if (k.ddelta_bias != nullptr) {
      store_lanes<T>(static_cast<T*>(k.ddelta_bias) + channels, tile, 1, 0, dbias);
    }
  });
}

template <class T>
void forward(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.constant_b) {
    k.constant_c ? forward_pass<T, true, true>(k, begin, end, scratch)
                 : forward_pass<T, true, false>(k, begin, end, scratch);
  } else {
    k.constant_c ? forward_pass<T, false, true>(k, begin, end, scratch)
                 : forward_pass<T, false, false>(k, begin, end, scratch);
  }
}

template <class T>
void backward(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.constant_b) {
    k.constant_c ? backward_pass<T, true, true>(k, begin, end, scratch)
                 : backward_pass<T, true, false>(k, begin, end, scratch);
  } else {
    k.constant_c ? backward_pass<T, false, true>(k, begin, end, scratch)
                 : backward_pass<T, false, false>(k, begin, end, scratch);
  }
}

constexpr vitzoo::SelectiveScanKernels kKernels = {forward<float>, forward<double>, backward<float>,
                                                   backward<double>};

}  // namespace
