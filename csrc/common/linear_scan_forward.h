// Linear attention with one decay a head and token, for one instruction set: chunks of
// kChunk tokens, whose pairs meet in matrix products while the state carries what came before. The decay from
// token j to token i is 2^(x_i - x_j) with x the running sum of log2 decays; x is a pair of T, high and low,
// since the difference of two long sums must be right to the last bit.
//
// Legend: s step, x log2 of the decay since the chunk's start, grow_i = 2^x_i, fall_j = 2^(x_end - x_j),
// M_ij = 2^(x_i - x_j) for j <= i, G = q k^T, S state before the chunk, R gradient of the state after it.
#pragma once

#include "linear_scan_tiles.h"

namespace {

template <class T>
struct Times {
  T *step, *slope, *high, *low, *grow, *fall;
  T end;  // decay over the whole chunk
};

template <class T>
inline Times<T> times_of(const LinearScanArgs& k, const Item& it, int64_t head, Arena<T>& arena) {
  constexpr int W = Simd<T>::W;
  using Sum = typename Wide<T>::type;
  Times<T> w;
  T** const taken1[] = {&w.step, &w.slope, &w.high, &w.low, &w.grow, &w.fall};
  for (T** p : taken1) {
    *p = arena.take(kChunk);
    __builtin_memset(*p, 0, kChunk * sizeof(T));
  }
  if (k.dt.data == nullptr) {
    for (int64_t t = 0; t < it.count; ++t) {
      w.step[t] = T(1);
    }
  } else {
    const int64_t at = it.batch * k.dt.batch + head * k.dt.channel + it.token * k.dt.token;
    const T bias = k.dt_bias == nullptr ? T(0) : static_cast<const T*>(k.dt_bias)[head];
    for (int64_t t = 0; t < it.count; ++t) {
      load_one(k.dt, at + t * k.dt.token, &w.step[t]);
      w.step[t] += bias;
      w.slope[t] = T(1);
    }
    for (int64_t t = 0; k.dt_softplus && t < it.count; t += W) {
      const Softplus<T> result = softplus<T>(load<T>(w.step + t));
      put<T>(w.step + t, result.value);
      put<T>(w.slope + t, result.slope);
    }
    for (int64_t t = it.count; t < padded(it.count); ++t) {
      w.step[t] = T(0);
    }
  }
  const Sum rate = Sum(k.rate[head]) * Sum(1.4426950408889634073599L);
  Sum x = 0;
  for (int64_t t = 0; t < it.count; ++t) {
    x += Sum(w.step[t]) * rate;
    w.high[t] = T(x);
    w.low[t] = T(x - Sum(w.high[t]));
  }
  const T high = w.high[it.count - 1], low = w.low[it.count - 1];
  for (int64_t t = 0; t < it.count; t += W) {
    const Vec<T> h = load<T>(w.high + t), l = load<T>(w.low + t);
    put<T>(w.grow + t, power2<T>(h));
    put<T>(w.fall + t, power2<T>((high - h) + (low - l)));
  }
  w.end = w.grow[it.count - 1];
  return w;
}

// Calls f(offset, M_i from j = offset on, or 0 above the diagonal) for the vectors of row i.
template <class T, class F>
VITZOO_INLINE void mask_row(const Times<T>& w, int64_t i, const F& f) {
  constexpr int W = Simd<T>::W;
  Vec<T> lane;
  for (int r = 0; r < W; ++r) {
    lane[r] = T(r);
  }
  const T high = w.high[i], low = w.low[i];
  for (int64_t j = 0; j <= i; j += W) {
    const Vec<T> m = power2<T>((high - load<T>(w.high + j)) + (low - load<T>(w.low + j)));
    f(j, m, lane <= T(i - j));
  }
}

// Zeros the rest of row i up to the end of the chunk, which blocks of rows may read.
template <class T>
VITZOO_INLINE void clear_row(T* row, int64_t i) {
  constexpr int W = Simd<T>::W;
  for (int64_t j = i / W * W + W; j < kChunk; j += W) {
    put<T>(row + j, Vec<T>{});
  }
}

template <class T>
struct Pairs {  // q (scaled), k, k^T, and G for j <= i
  T *q, *k, *kt, *g;
};

template <class T>
inline Pairs<T> pairs_of(const LinearScanArgs& k, const Item& it, Arena<T>& arena) {
  constexpr int W = Simd<T>::W;
  const int64_t ld = padded(k.dk);
  Pairs<T> w{arena.take(kChunk * ld), arena.take(kChunk * ld), arena.take(kChunk * ld),
             arena.take(kChunk * kChunk)};
  load_rows(k.q, it.batch, it.group, it.token, it.count, k.dk, w.q, ld);
  load_rows(k.k, it.batch, it.group, it.token, it.count, k.dk, w.k, ld);
  for (int64_t i = 0; i < it.count * ld; i += W) {
    put<T>(w.q + i, load<T>(w.q + i) * T(k.scale));
  }
  transpose<T>(w.k, ld, padded(it.count), ld, w.kt, kChunk);
  gemm<T>(it.count, padded(it.count), k.dk, {w.q, ld, 1}, w.kt, kChunk, w.g, kChunk, Write::store,
          Part::columns);
  return w;
}

// dout through the gate: dout silu(z).
template <class T>
inline void load_dy(const LinearScanArgs& k, const Item& it, int64_t head, T* dy, T* gate) {
  constexpr int W = Simd<T>::W;
  const int64_t ld = padded(k.dv);
  load_rows(k.dout, it.batch, head, it.token, it.count, k.dv, dy, ld);
  if (k.z.data != nullptr) {
    load_rows(k.z, it.batch, head, it.token, it.count, k.dv, gate, ld);
    for (int64_t i = 0; i < it.count * ld; i += W) {
      const Vec<T> z = load<T>(gate + i);
      put<T>(dy + i, load<T>(dy + i) * (z * sigmoid<T>(z)));
    }
  }
}

template <class T>
VITZOO_INLINE Vec<T> skip_of(const LinearScanArgs& k, int64_t head, int64_t j) {
  constexpr int W = Simd<T>::W;
  const T* const d = static_cast<const T*>(k.d);
  if (!k.d_by_channel) {
    return broadcast<T>(d[head]);
  }
  const int64_t rest = k.dv - j;
  return rest <= 0 ? Vec<T>{} : load_row<T>(d + head * k.dv + j, rest < W ? int(rest) : W);
}

template <class T>
void output(const LinearScanArgs& k, ChunkOf where, void* scratch) {
  constexpr int W = Simd<T>::W;
  const Item it = item_of(k, where);
  const int64_t ldk = padded(k.dk), ldv = padded(k.dv);
  Arena<T> arena{static_cast<T*>(scratch)};
  const Pairs<T> pairs = pairs_of<T>(k, it, arena);
  T* const p = arena.take(kChunk * kChunk);
  T* const v = arena.take(kChunk * ldv);
  T* const y = arena.take(kChunk * ldv);
  T* const gate = arena.take(kChunk * ldv);
  const bool carried = where.chunk > 0 || k.has_initial;
  for (int64_t head = it.head; head < it.head + it.heads; ++head) {
    Arena<T> rest = arena;
    const Times<T> w = times_of<T>(k, it, head, rest);
    for (int64_t i = 0; i < it.count; ++i) {
      mask_row<T>(w, i, [&](int64_t j, Vec<T> m, auto below) {
        const Vec<T> value = m * load<T>(pairs.g + i * kChunk + j) * load<T>(w.step + j);
        put<T>(p + i * kChunk + j, below ? value : Vec<T>{});
      });
      clear_row<T>(p + i * kChunk, i);
    }
    load_rows(k.v, it.batch, head, it.token, it.count, k.dv, v, ldv);
    if (carried) {
      gemm<T>(it.count, ldv, k.dk, {pairs.q, ldk, 1}, matrix_of<T>(k.states, k, where.state_slot, it, head),
              ldv, y, ldv, Write::store);
      scale_rows<T>(y, w.grow, it.count, ldv, y);
    }
    gemm<T>(it.count, ldv, it.count, {p, kChunk, 1}, v, ldv, y, ldv, carried ? Write::add : Write::store,
            Part::lower);
    for (int64_t j = 0; k.d != nullptr && j < k.dv; j += W) {
      const Vec<T> d = skip_of<T>(k, head, j);
      for (int64_t t = 0; t < it.count; ++t) {
        put<T>(y + t * ldv + j, load<T>(y + t * ldv + j) + d * load<T>(v + t * ldv + j));
      }
    }
    if (k.z.data != nullptr) {
      load_rows(k.z, it.batch, head, it.token, it.count, k.dv, gate, ldv);
      for (int64_t i = 0; i < it.count * ldv; i += W) {
        const Vec<T> z = load<T>(gate + i);
        put<T>(y + i, load<T>(y + i) * (z * sigmoid<T>(z)));
      }
    }
    store_rows(k.out, it.batch, head, it.token, it.count, k.dv, y, ldv);
  }
}

// k^T (fall s v), or q^T (grow dy) where `Gradient`: what a chunk adds to the state after it, or to the
// gradient of the state before it; `Next` adds the decayed old matrix in the same go.
template <class T, bool Gradient, bool Next>
void advance(const LinearScanArgs& k, ChunkOf where, void* scratch) {
  const Item it = item_of(k, where);
  const int64_t ldk = padded(k.dk), ldv = padded(k.dv);
  Arena<T> arena{static_cast<T*>(scratch)};
  T* const left = arena.take(kChunk * ldk);
  T* const right = arena.take(kChunk * ldv);
  T* const gate = arena.take(kChunk * ldv);
  void* const matrices = Gradient ? k.gradients : k.states;
  const int64_t slot = Gradient ? where.gradient_slot : where.state_slot;
  void* const decays = Gradient ? k.gradient_decays : k.state_decays;
  load_rows(Gradient ? k.q : k.k, it.batch, it.group, it.token, it.count, k.dk, left, ldk);
  for (int64_t head = it.head; head < it.head + it.heads; ++head) {
    Arena<T> rest = arena;
    const Times<T> w = times_of<T>(k, it, head, rest);
    if constexpr (Gradient) {
      load_dy<T>(k, it, head, right, gate);
      for (int64_t t = 0; t < it.count; ++t) {
        w.fall[t] = w.grow[t] * T(k.scale);
      }
    } else {
      load_rows(k.v, it.batch, head, it.token, it.count, k.dv, right, ldv);
      for (int64_t t = 0; t < it.count; ++t) {
        w.fall[t] *= w.step[t];
      }
    }
    scale_rows<T>(right, w.fall, it.count, ldv, right);
    gemm<T>(ldk, ldv, it.count, {left, 1, ldk}, right, ldv, matrix_of<T>(matrices, k, slot, it, head), ldv,
            Next ? Write::scale : Write::store, Part::full, w.end);
    if constexpr (!Next) {
      *decay_of<T>(decays, k, slot, it, head) = w.end;
    }
  }
}

template <class T>
void pass_states(const LinearScanArgs& k, int64_t head, int64_t count, bool reverse, void* carry) {
  constexpr int W = Simd<T>::W;
  const int64_t size = vitzoo::state_size(k), images = k.batch * k.heads;
  T* const matrices = static_cast<T*>(reverse ? k.gradients : k.states) + head * size;
  const T* const decays = static_cast<const T*>(reverse ? k.gradient_decays : k.state_decays) + head;
  T* const state = static_cast<T*>(carry) + head * size;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t slot = reverse ? count - 1 - n : n;
    T* const matrix = matrices + slot * images * size;
    const T decay = decays[slot * images];
    for (int64_t i = 0; i < size; i += W) {
      const Vec<T> before = load<T>(state + i);
      put<T>(state + i, load<T>(matrix + i) + before * decay);
      put<T>(matrix + i, before);
    }
  }
}

}  // namespace
