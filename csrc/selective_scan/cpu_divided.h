// A scan divided along its tokens, forward and backward; see DividedScanArgs and cpu_kernel.h. What a piece
// passes on is computed in one way wherever it is computed, so that the blocks of pieces, which depend on the
// number of threads, change no bit.
#pragma once

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace {

using vitzoo::DividedScanArgs;

template <class T>
VITZOO_INLINE T* states_of(const DividedScanArgs& d, const Tile& tile, int64_t piece) {
  return static_cast<T*>(d.states) + (tile.batch * (d.pieces + 1) + piece) * d.scan->dim * d.scan->dstate;
}

// An image's own in (batch, dim, dstate), or null.
template <class T, class P>
VITZOO_INLINE T* states_after(const SelectiveScanArgs& k, P* base, const Tile& tile) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + tile.batch * k.dim * k.dstate;
}

template <class T>
VITZOO_INLINE T* gradients_of(const DividedScanArgs& d, const Tile& tile, int64_t piece) {
  return static_cast<T*>(d.gradients) + (tile.batch * d.pieces + piece) * d.scan->dim * d.scan->dstate;
}

template <class T>
VITZOO_INLINE T* steps_of(const DividedScanArgs& d, const Tile& tile, int64_t piece) {
  return static_cast<T*>(d.steps) + (tile.batch * d.pieces + piece) * d.scan->dim;
}

// What follows a piece: what it adds, `own`, and what came before it, decayed over the sum of its steps.
// States that are zero stay so, however fast they would grow.
template <class T>
VITZOO_INLINE Vec<T> passed_on(Vec<T> own, Vec<T> steps, Vec<T> rate2, Vec<T> before) {
  const Vec<T> decayed = exp2_product<T, true>(steps, rate2) * before;
  return own + (before == T(0) ? before : decayed);
}

// The states after a chunk, in w.state, and the gradient of those before it, in w.carry, from what they were
// on the other side.
template <class T, int NU, bool Clamp>
VITZOO_INLINE void outline_states(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                                  int64_t n, int64_t token, int64_t count, bool want_gradient) {
  typedef Vec<T> V;
  Row<T, false> b[NU], c[NU];
  V state[NU], carry[NU], rate[NU];
#pragma GCC unroll 4
  for (int i = 0; i < NU; ++i) {
    b[i] = row_of<T, false>(k.b, k, tile, n + i, token);
    c[i] = row_of<T, false>(k.c, k, tile, n + i, token);
    state[i] = w.state[n + i];
    carry[i] = w.carry[n + i];
    rate[i] = w.rate2[n + i];
  }
  for (int64_t t = 0; t < count; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < NU; ++i) {
      const V a = exp2_product<T, Clamp>(w.s[t], rate[i]);
      const V push = rounded(w.drive[t] * b[i].at(t));
      state[i] = a * state[i] + push;
      w.a[i][t] = a;
    }
  }
  for (int64_t t = count - 1; want_gradient && t >= 0; --t) {
#pragma GCC unroll 4
    for (int i = 0; i < NU; ++i) {
      carry[i] = (w.dy[t] * c[i].at(t) + carry[i]) * w.a[i][t];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NU; ++i) {
    w.state[n + i] = state[i];
    w.carry[n + i] = carry[i];
  }
}

template <class T, bool Clamp>
VITZOO_INLINE void outline_chunk(const SelectiveScanArgs& k, const Tile& tile, const Backward<T>& w,
                                 int64_t token, int64_t count, bool want_gradient) {
  int64_t n = 0;
  for (; n + kSweepStates <= k.dstate; n += kSweepStates) {
    outline_states<T, kSweepStates, Clamp>(k, tile, w, n, token, count, want_gradient);
  }
  for (; n < k.dstate; ++n) {
    outline_states<T, 1, Clamp>(k, tile, w, n, token, count, want_gradient);
  }
}

// What a piece passes on: to the next the states, to the one before their gradient, both from zero.
// load(token, count) brings delta and u to w.s and w.x, load_gradient(token, count) that of y to w.dy.
template <class T, class F, class G>
VITZOO_INLINE void outline_piece(const DividedScanArgs& d, const Tile& tile, const Backward<T>& w,
                                 int64_t piece, const F& load, const G& load_gradient) {
  const SelectiveScanArgs& k = *d.scan;
  const bool want_gradient = d.gradients != nullptr;
  const Vec<T> bias = load_lanes<T>(k.delta_bias, tile, 1, 0);
  Vec<T> fastest{}, steps{};
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.rate2[n] = load_lanes<T>(k.a, tile, k.dstate, n) * T(kLog2e);
    fastest = larger(fastest, absolute<T>(w.rate2[n]));
    w.state[n] = w.carry[n] = Vec<T>{};
  }
  const int64_t begin = piece * d.tokens, end = begin + d.tokens < k.seqlen ? begin + d.tokens : k.seqlen;
  for (int64_t token = begin; token < end; token += kBackwardTokens) {
    const int64_t rest = end - token, count = rest < kBackwardTokens ? rest : kBackwardTokens;
    load(token, count);
    const Vec<T> largest = k.delta_softplus
                               ? prepare<T, true>(count, bias, Vec<T>{}, w.s, w.x, w.drive, w.y)
                               : prepare<T, false>(count, bias, Vec<T>{}, w.s, w.x, w.drive, w.y);
    for (int64_t t = 0; t < count; ++t) {
      steps += w.s[t];
    }
    if (want_gradient) {
      load_gradient(token, count);
    }
    if (all_below<T>(largest * fastest, kPlainExponent<T>)) {
      outline_chunk<T, false>(k, tile, w, token, count, want_gradient);
    } else {
      outline_chunk<T, true>(k, tile, w, token, count, want_gradient);
    }
  }
  store_lanes<T>(steps_of<T>(d, tile, piece), tile, 1, 0, steps);
  for (int64_t n = 0; n < k.dstate; ++n) {
    store_lanes<T>(states_of<T>(d, tile, piece + 1), tile, k.dstate, n, w.state[n]);
    if (want_gradient && piece > 0) {
      store_lanes<T>(gradients_of<T>(d, tile, piece - 1), tile, k.dstate, n, w.carry[n]);
    }
  }
}

// The outputs of pieces [first, last), from the states before them, and what they pass on.
// stretch(own, token, count) advances w.h and w.local over some tokens.
template <class T, class F>
VITZOO_INLINE void run_block(const DividedScanArgs& d, const Tile& tile, const Forward<T>& w, int64_t first,
                             int64_t last, const F& stretch) {
  const SelectiveScanArgs& k = *d.scan;
  const Channels<T> own = begin_forward<T>(k, tile, w);
  for (int64_t n = 0; first > 0 && n < k.dstate; ++n) {
    w.h[n] = load_lanes<T>(states_of<T>(d, tile, first), tile, k.dstate, n);
  }
  for (int64_t piece = first; piece < last; ++piece) {
    for (int64_t n = 0; n < k.dstate; ++n) {
      w.before[n] = w.h[n];
      w.local[n] = Vec<T>{};
    }
    Vec<T> steps{};
    const int64_t begin = piece * d.tokens, end = begin + d.tokens < k.seqlen ? begin + d.tokens : k.seqlen;
    for (int64_t token = begin; token < end; token += kForwardTokens) {
      const int64_t rest = end - token, count = rest < kForwardTokens ? rest : kForwardTokens;
      stretch(own, token, count);
      for (int64_t t = 0; t < count; ++t) {
        steps += w.s[t];
      }
    }
    for (int64_t n = 0; n < k.dstate; ++n) {
      w.h[n] = passed_on<T>(w.local[n], steps, w.a2[n], w.before[n]);
    }
  }
  T* const after = last == d.pieces ? states_after<T>(k, k.last_state, tile) : states_of<T>(d, tile, last);
  for (int64_t n = 0; after != nullptr && (last == d.pieces || first == 0) && n < k.dstate; ++n) {
    store_lanes<T>(after, tile, k.dstate, n, w.h[n]);
  }
}

// From pieces [first, last) to the states before pieces first + 1 to last.
template <class T>
VITZOO_INLINE void carry_states(const DividedScanArgs& d, const Tile& tile, int64_t first, int64_t last) {
  const SelectiveScanArgs& k = *d.scan;
  for (int64_t n = 0; n < k.dstate; ++n) {
    const Vec<T> rate2 = load_lanes<T>(k.a, tile, k.dstate, n) * T(kLog2e);
    Vec<T> state = load_lanes<T>(states_of<T>(d, tile, first), tile, k.dstate, n);
    for (int64_t piece = first; piece < last; ++piece) {
      T* const after = states_of<T>(d, tile, piece + 1);
      const Vec<T> steps = load_lanes<T>(steps_of<T>(d, tile, piece), tile, 1, 0);
      state = passed_on<T>(load_lanes<T>(after, tile, k.dstate, n), steps, rate2, state);
      store_lanes<T>(after, tile, k.dstate, n, state);
    }
  }
}

// The states before every piece and the gradients of those after it.
template <class T>
VITZOO_INLINE void carry_both(const DividedScanArgs& d, const Tile& tile) {
  const SelectiveScanArgs& k = *d.scan;
  const T* const dlast = states_after<const T>(k, k.dlast_state, tile);
  for (int64_t n = 0; n < k.dstate; ++n) {
    const Vec<T> rate2 = load_lanes<T>(k.a, tile, k.dstate, n) * T(kLog2e);
    store_lanes<T>(states_of<T>(d, tile, 0), tile, k.dstate, n, Vec<T>{});
    Vec<T> gradient = load_lanes<T>(dlast, tile, k.dstate, n);
    store_lanes<T>(gradients_of<T>(d, tile, d.pieces - 1), tile, k.dstate, n, gradient);
    for (int64_t piece = d.pieces - 1; piece > 0; --piece) {
      T* const before = gradients_of<T>(d, tile, piece - 1);
      const Vec<T> steps = load_lanes<T>(steps_of<T>(d, tile, piece), tile, 1, 0);
      gradient = passed_on<T>(load_lanes<T>(before, tile, k.dstate, n), steps, rate2, gradient);
      store_lanes<T>(before, tile, k.dstate, n, gradient);
    }
  }
  carry_states<T>(d, tile, 0, d.pieces - 1);
}

// The gradients of a piece, a chunk of the backward pass, from what it was passed; chunk(own) runs it.
template <class T, class F>
VITZOO_INLINE void run_piece(const DividedScanArgs& d, const Tile& tile, const Backward<T>& w, int64_t piece,
                             const F& chunk) {
  const SelectiveScanArgs& k = *d.scan;
  ChannelSums<T> own = begin_backward<T>(k, tile, w);
  for (int64_t n = 0; n < k.dstate; ++n) {
    w.bounds[piece * k.dstate + n] = load_lanes<T>(states_of<T>(d, tile, piece), tile, k.dstate, n);
    w.carry[n] = load_lanes<T>(gradients_of<T>(d, tile, piece), tile, k.dstate, n);
  }
  chunk(own);
  end_backward<T, false, false>(k, tile, w, own, piece);
}

// One scan, whose tokens are read where they lie.

template <class T>
void outline_in_place(const DividedScanArgs& d, const Tile& tile, const Backward<T>& w, int64_t piece) {
  const SelectiveScanArgs& k = *d.scan;
  outline_piece<T>(
      d, tile, w, piece,
      [&](int64_t token, int64_t count) __attribute__((always_inline)) {
        load_tile(k.delta, tile.batch, tile.channel, tile.width, token, count, w.s);
        load_tile(k.u, tile.batch, tile.channel, tile.width, token, count, w.x);
      },
      [&](int64_t token, int64_t count) __attribute__((always_inline)) {
        load_tile(k.dout, tile.batch, tile.channel, tile.width, token, count, w.dy);
        if (k.z.data != nullptr) {
          load_tile(k.z, tile.batch, tile.channel, tile.width, token, count, w.gate_slope);
          open_gate<T>(w.gate_slope, w.dy, w.gate_slope, count);
        }
      });
}

template <class T>
void run_in_place(const DividedScanArgs& d, const Tile& tile, const Forward<T>& w, int64_t first,
                  int64_t last) {
  const SelectiveScanArgs& k = *d.scan;
  run_block<T>(d, tile, w, first, last < d.pieces ? last : d.pieces,
               [&](const Channels<T>& own, int64_t token, int64_t count) __attribute__((always_inline)) {
                 run_stretch<T, false, false, true>(k, tile, w, own, token, count,
                                                    [](int64_t, int64_t) __attribute__((always_inline)) {});
               });
}

// Calls f(tile, number) for work items [begin, end), `each` to one of the undivided scan.
template <class T, class F>
VITZOO_INLINE void for_divided(const SelectiveScanArgs& k, int64_t each, int64_t begin, int64_t end,
                               const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    for_tiles<T>(k, item / each, item / each + 1,
                 [&](const Tile& tile) __attribute__((always_inline)) { f(tile, item % each); });
  }
}

// The first block, and an outline of all others but the last.
template <class T>
void divided_first(const DividedScanArgs& d, int64_t begin, int64_t end, void* scratch) {
  const SelectiveScanArgs& k = *d.scan;
  const Forward<T> w(scratch, k.dstate);
  const Backward<T> outline(scratch, k.dstate, 0);
  for_divided<T>(k, d.blocks > 1 ? d.blocks - 1 : 1, begin, end,
                 [&](const Tile& tile, int64_t i) __attribute__((always_inline)) {
                   if (i == 0) {
                     run_in_place<T>(d, tile, w, 0, d.block);
                   } else {
                     for (int64_t piece = i * d.block; piece < (i + 1) * d.block; ++piece) {
                       outline_in_place<T>(d, tile, outline, piece);
                     }
                   }
                 });
}

template <class T>
void divided_carry(const DividedScanArgs& d, int64_t begin, int64_t end, void*) {
  for_tiles<T>(*d.scan, begin, end, [&](const Tile& tile) __attribute__((always_inline)) {
    carry_states<T>(d, tile, d.block, (d.blocks - 1) * d.block);
  });
}

template <class T>
void divided_second(const DividedScanArgs& d, int64_t begin, int64_t end, void* scratch) {
  const Forward<T> w(scratch, d.scan->dstate);
  for_divided<T>(*d.scan, d.blocks - 1, begin, end,
                 [&](const Tile& tile, int64_t i) __attribute__((always_inline)) {
                   run_in_place<T>(d, tile, w, (i + 1) * d.block, (i + 2) * d.block);
                 });
}

template <class T>
void divided_outline(const DividedScanArgs& d, int64_t begin, int64_t end, void* scratch) {
  const Backward<T> w(scratch, d.scan->dstate, 0);
  for_divided<T>(*d.scan, d.pieces, begin, end,
                 [&](const Tile& tile, int64_t piece)
                     __attribute__((always_inline)) { outline_in_place<T>(d, tile, w, piece); });
}

template <class T>
void divided_carry_both(const DividedScanArgs& d, int64_t begin, int64_t end, void*) {
  for_tiles<T>(*d.scan, begin, end,
               [&](const Tile& tile) __attribute__((always_inline)) { carry_both<T>(d, tile); });
}

template <class T>
void divided_backward(const DividedScanArgs& d, int64_t begin, int64_t end, void* scratch) {
  const SelectiveScanArgs& k = *d.scan;
  const Backward<T> w(scratch, k.dstate, k.seqlen);
  for_divided<T>(k, d.pieces, begin, end,
                 [&](const Tile& tile, int64_t piece) __attribute__((always_inline)) {
                   run_piece<T>(d, tile, w, piece, [&](ChannelSums<T>& own) __attribute__((always_inline)) {
                     run_chunk<T, false, false>(k, tile, w, own, piece);
                   });
                 });
}

template <class T>
constexpr vitzoo::DividedScanKernels kDivided = {divided_first<T>,      divided_carry<T>,
                                                 divided_second<T>,     divided_outline<T>,
                                                 divided_carry_both<T>, divided_backward<T>};

}  // namespace
