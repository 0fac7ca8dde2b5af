// The backward pass of a chunk for one instruction set; legend in linear_scan_forward.h.
#pragma once

#include "linear_scan_forward.h"

namespace {

template <class T>
struct BackwardWork {
  T *p, *t, *v, *xt, *dy, *dv, *y, *gate, *dq, *dk, *term, *turned;  // tiles
  T *rows, *columns, *from_state, *to_state, *dstep;                 // one a token
};

// The pairs' part: p becomes M G, t (dy (s v)^T) becomes the gradient of G, and rows_t the sum of the
// gradient of log M over the pairs j < t <= i, whose decay holds that of token t. Rows come from the last to
// the first, so that each column's sum over i >= t is at hand: differences of longer sums would lose digits.
template <class T>
VITZOO_INLINE void mask_pairs(const Times<T>& w, const Item& it, const T* g, const BackwardWork<T>& b) {
  constexpr int W = Simd<T>::W;
  Vec<T> lane;
  for (int r = 0; r < W; ++r) {
    lane[r] = T(r);
  }
  for (int64_t j = 0; j < kChunk; j += W) {
    put<T>(b.columns + j, Vec<T>{});
  }
  for (int64_t i = it.count - 1; i >= 0; --i) {
    Vec<T> sum{};
    mask_row<T>(w, i, [&](int64_t j, Vec<T> m, auto below) {
      const auto strictly = lane < T(i - j);
      const Vec<T> product = m * load<T>(g + i * kChunk + j), t = load<T>(b.t + i * kChunk + j);
      put<T>(b.p + i * kChunk + j, below ? product : Vec<T>{});
      put<T>(b.t + i * kChunk + j, below ? m * t : Vec<T>{});
      const Vec<T> column = load<T>(b.columns + j) + (strictly ? product * t : Vec<T>{});
      put<T>(b.columns + j, column);
      sum += strictly ? column : Vec<T>{};
    });
    clear_row<T>(b.p + i * kChunk, i);
    clear_row<T>(b.t + i * kChunk, i);
    b.rows[i] = sum_of<T>(sum);
  }
}

// Gradients of steps, rate and skip, and dv, from the gradient dv of (s v) and what the pairs and states
// left.
template <class T>
VITZOO_INLINE void finish_head(const LinearScanArgs& k, const Item& it, ChunkOf where, int64_t head,
                               const Times<T>& w, const BackwardWork<T>& b, T through) {
  constexpr int W = Simd<T>::W;
  const int64_t ldv = padded(k.dv);
  double sum = 0, rate = 0;
  for (int64_t t = it.count - 1; t >= 0; --t) {
    sum += double(b.from_state[t]);
    b.rows[t] = T(double(b.rows[t]) + sum);
  }
  sum = through;
  for (int64_t t = 0; t < it.count; ++t) {
    const double log_decay = double(b.rows[t]) + sum;  // its gradient
    sum += double(b.to_state[t]);
    rate += double(w.step[t]) * log_decay;
    b.dstep[t] = T(k.rate[head] * log_decay);
  }
  const int64_t partial = (it.batch * k.chunks + where.chunk) * k.heads + head;
  static_cast<T*>(k.drate)[partial] = T(rate);
  load_rows(k.v, it.batch, head, it.token, it.count, k.dv, b.v, ldv);
  for (int64_t t = 0; t < it.count; ++t) {
    Vec<T> dot{};
    for (int64_t j = 0; j < ldv; j += W) {
      const Vec<T> dv = load<T>(b.dv + t * ldv + j);
      dot += dv * load<T>(b.v + t * ldv + j);
      Vec<T> dx = dv * w.step[t];
      if (k.d != nullptr) {
        dx += skip_of<T>(k, head, j) * load<T>(b.dy + t * ldv + j);
      }
      put<T>(b.dv + t * ldv + j, dx);
    }
    if (k.ddt != nullptr) {
      static_cast<T*>(k.ddt)[(it.batch * k.seqlen + it.token + t) * k.heads + head] =
          (b.dstep[t] + sum_of<T>(dot)) * w.slope[t];
    }
  }
  store_rows(k.dv_out, it.batch, head, it.token, it.count, k.dv, b.dv, ldv);
  for (int64_t j = 0; k.dd != nullptr && j < k.dv; j += W) {
    Vec<T> dd{};
    for (int64_t t = 0; t < it.count; ++t) {
      dd += load<T>(b.dy + t * ldv + j) * load<T>(b.v + t * ldv + j);
    }
    store_row<T>(static_cast<T*>(k.dd) + partial * k.dv + j, dd, k.dv - j < W ? int(k.dv - j) : W);
  }
}

// dz = dout y silu'(z), with y formed again.
template <class T>
VITZOO_INLINE void gate_gradient(const LinearScanArgs& k, const Item& it, int64_t head, const Times<T>& w,
                                 const Pairs<T>& pairs, const T* state, bool carried,
                                 const BackwardWork<T>& b) {
  constexpr int W = Simd<T>::W;
  const int64_t ldk = padded(k.dk), ldv = padded(k.dv);
  if (carried) {
    gemm<T>(it.count, ldv, k.dk, {pairs.q, ldk, 1}, state, ldv, b.y, ldv, Write::store);
    scale_rows<T>(b.y, w.grow, it.count, ldv, b.y);
  }
  gemm<T>(it.count, ldv, it.count, {b.p, kChunk, 1}, b.v, ldv, b.y, ldv, carried ? Write::add : Write::store,
          Part::lower);
  if (k.d != nullptr) {
    load_rows(k.v, it.batch, head, it.token, it.count, k.dv, b.dv, ldv);
    for (int64_t j = 0; j < k.dv; j += W) {
      const Vec<T> d = skip_of<T>(k, head, j);
      for (int64_t t = 0; t < it.count; ++t) {
        put<T>(b.y + t * ldv + j, load<T>(b.y + t * ldv + j) + d * load<T>(b.dv + t * ldv + j));
      }
    }
  }
  load_rows(k.dout, it.batch, head, it.token, it.count, k.dv, b.dv, ldv);
  for (int64_t i = 0; i < it.count * ldv; i += W) {
    const Vec<T> z = load<T>(b.gate + i), gate = sigmoid<T>(z);
    put<T>(b.dv + i, load<T>(b.dv + i) * load<T>(b.y + i) * gate * (z * (T(1) - gate) + T(1)));
  }
  store_rows(k.dz, it.batch, head, it.token, it.count, k.dv, b.dv, ldv);
}

template <class T>
void backward(const LinearScanArgs& k, ChunkOf where, void* scratch) {
  constexpr int W = Simd<T>::W;
  const Item it = item_of(k, where);
  const int64_t ldk = padded(k.dk), ldv = padded(k.dv), rows = padded(it.count);
  Arena<T> arena{static_cast<T*>(scratch)};
  const Pairs<T> pairs = pairs_of<T>(k, it, arena);
  BackwardWork<T> b;
  b.p = arena.take(kChunk * kChunk);
  b.t = arena.take(kChunk * kChunk);
  T** const taken2[] = {&b.v, &b.xt, &b.dy, &b.dv, &b.y, &b.gate};
  for (T** p : taken2) {
    *p = arena.take(kChunk * ldv);
  }
  b.dq = arena.take(kChunk * ldk);
  b.dk = arena.take(kChunk * ldk);
  b.term = pairs.kt;  // k^T is not needed after G
  b.turned = arena.take(ldk * ldv);
  T** const taken3[] = {&b.rows, &b.columns, &b.from_state, &b.to_state, &b.dstep};
  for (T** p : taken3) {
    *p = arena.take(kChunk);
  }
  __builtin_memset(b.dq, 0, size_t(it.count * ldk) * sizeof(T));
  __builtin_memset(b.dk, 0, size_t(it.count * ldk) * sizeof(T));
  const bool carried = where.chunk > 0 || k.has_initial;
  for (int64_t head = it.head; head < it.head + it.heads; ++head) {
    Arena<T> rest = arena;
    const Times<T> w = times_of<T>(k, it, head, rest);
    const T* const state = matrix_of<T>(k.states, k, where.state_slot, it, head);
    const T* const gradient = matrix_of<T>(k.gradients, k, where.gradient_slot, it, head);
    load_rows(k.v, it.batch, head, it.token, it.count, k.dv, b.v, ldv);
    scale_rows<T>(b.v, w.step, it.count, ldv, b.v);
    load_dy<T>(k, it, head, b.dy, b.gate);
    transpose<T>(b.v, ldv, rows, ldv, b.xt, kChunk);
    gemm<T>(it.count, rows, k.dv, {b.dy, ldv, 1}, b.xt, kChunk, b.t, kChunk, Write::store, Part::columns);
    mask_pairs<T>(w, it, pairs.g, b);
    if (k.z.data != nullptr) {
      gate_gradient<T>(k, it, head, w, pairs, state, carried, b);
    }
    // d(s v) = fall (k R) + P^T dy
    gemm<T>(it.count, ldv, k.dk, {pairs.k, ldk, 1}, gradient, ldv, b.dv, ldv, Write::store);
    scale_rows_dot<T>(b.dv, w.fall, b.v, it.count, ldv, b.to_state, static_cast<T*>(nullptr));
    gemm<T>(it.count, ldv, it.count, {b.p, 1, kChunk}, b.dy, ldv, b.dv, ldv, Write::add, Part::upper);
    // dq += grow (dy S^T) + dG k
    transpose<T>(state, ldv, ldk, ldv, b.turned, ldk);
    gemm<T>(it.count, ldk, k.dv, {b.dy, ldv, 1}, b.turned, ldk, b.term, ldk, Write::store);
    scale_rows_dot<T>(b.term, w.grow, pairs.q, it.count, ldk, b.from_state, b.dq);
    gemm<T>(it.count, ldk, it.count, {b.t, kChunk, 1}, pairs.k, ldk, b.dq, ldk, Write::add, Part::lower);
    // dk += fall ((s v) R^T) + dG^T q
    transpose<T>(gradient, ldv, ldk, ldv, b.turned, ldk);
    gemm<T>(it.count, ldk, k.dv, {b.v, ldv, 1}, b.turned, ldk, b.term, ldk, Write::store);
    scale_rows_dot<T>(b.term, w.fall, pairs.k, it.count, ldk, b.dstep, b.dk);
    gemm<T>(it.count, ldk, it.count, {b.t, 1, kChunk}, pairs.q, ldk, b.dk, ldk, Write::add, Part::upper);
    Vec<T> through{};
    for (int64_t i = 0; i < ldk * ldv; i += W) {
      through += load<T>(state + i) * load<T>(gradient + i);
    }
    finish_head<T>(k, it, where, head, w, b, sum_of<T>(through) * w.end);
  }
  View to;
  to.kind = sizeof(T) == 8 ? Kind::f64 : Kind::f32;
  to.token = k.groups * k.dk;
  to.channel = k.dk;
  to.batch = k.parts * k.span * to.token;
  const int64_t offset = (it.part * k.span - k.first) * to.token;
  for (int64_t i = 0; i < it.count * ldk; i += W) {
    put<T>(b.dq + i, load<T>(b.dq + i) * T(k.scale));
  }
  to.data = static_cast<T*>(k.dq) + offset;
  store_rows(to, it.batch, it.group, it.token, it.count, k.dk, b.dq, ldk);
  to.data = static_cast<T*>(k.dk_out) + offset;
  store_rows(to, it.batch, it.group, it.token, it.count, k.dk, b.dk, ldk);
}

}  // namespace
