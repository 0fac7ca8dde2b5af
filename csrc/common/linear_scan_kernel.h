// Linear attention with one decay a head and token, forward and backward, for one instruction set: chunks of
// kChunk tokens, whose pairs meet in matrix products while the state carries what came before. The decay from
// token j to token i is 2^(x_i - x_j) with x the running sum of log2 decays; x is a pair of T, high and low,
// since the difference of two long sums must be right to the last bit.
//
// Legend: s step, x log2 of the decay since the chunk's start, grow_i = 2^x_i, fall_j = 2^(x_end - x_j),
// M_ij = 2^(x_i - x_j) for j <= i, G = q k^T, S state before the chunk, R gradient of the state after it.
#pragma once

#include "gemm.h"
#include "linear_scan.h"

namespace {

using vitzoo::ChunkOf;
using vitzoo::kChunk;
using vitzoo::LinearScanArgs;
using vitzoo::padded;

template <class T>
struct Wide {
  using type = double;
};
template <>
struct Wide<double> {
  using type = long double;
};

// Scratch memory of a thread, handed out in order.
template <class T>
struct Arena {
  T* next;
  VITZOO_INLINE T* take(int64_t size) {
    T* const p = next;
    next += size;
    return p;
  }
};

struct Item {
  int64_t batch, group, part, head, heads;  // first head and number of heads
  int64_t token, count;                     // of the chunk
};

VITZOO_INLINE Item item_of(const LinearScanArgs& k, ChunkOf where) {
  Item it;
  it.part = where.item % k.parts;
  it.group = where.item / k.parts % k.groups;
  it.batch = where.item / k.parts / k.groups;
  const int64_t of_group = k.heads / k.groups, start = it.part * k.part_heads;
  it.head = it.group * of_group + start;
  it.heads = of_group - start < k.part_heads ? of_group - start : k.part_heads;
  it.token = where.chunk * kChunk;
  it.count = k.seqlen - it.token < kChunk ? k.seqlen - it.token : kChunk;
  return it;
}

template <class T>
VITZOO_INLINE T* matrix_of(void* base, const LinearScanArgs& k, int64_t slot, const Item& it, int64_t head) {
  return static_cast<T*>(base) + ((slot * k.batch + it.batch) * k.heads + head) * vitzoo::state_size(k);
}

template <class T>
VITZOO_INLINE T* decay_of(void* base, const LinearScanArgs& k, int64_t slot, const Item& it, int64_t head) {
  return static_cast<T*>(base) + (slot * k.batch + it.batch) * k.heads + head;
}

template <class T>
VITZOO_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
VITZOO_INLINE void put(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
VITZOO_INLINE Vec<T> power2(Vec<T> x) {
  return exp2_product<T, true>(x, broadcast<T>(T(1)));
}

template <class T>
VITZOO_INLINE T sum_of(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < Simd<T>::W; ++i) {
    sum += v[i];
  }
  return sum;
}

template <class T, class S>
inline void load_rows_of(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                         int64_t width, T* out, int64_t ld) {
  constexpr int W = Simd<T>::W;
  const S* p =
      static_cast<const S*>(view.data) + batch * view.batch + channel * view.channel + token * view.token;
  for (int64_t t = 0; t < count; ++t, p += view.token) {
    for (int64_t j = 0; j < ld; j += W) {
      const int64_t rest = width - j;
      put<T>(out + t * ld + j, rest <= 0 ? Vec<T>{} : load_row<T>(p + j, rest < W ? int(rest) : W));
    }
  }
}

// (count, width) into rows of `ld`, with zeros around it up to whole vectors of rows and columns.
inline void load_rows(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                      int64_t width, double* out, int64_t ld) {
  load_rows_of<double, double>(view, batch, channel, token, count, width, out, ld);
  __builtin_memset(out + count * ld, 0, size_t((padded(count) - count) * ld) * sizeof(double));
}

inline void load_rows(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                      int64_t width, float* out, int64_t ld) {
  switch (view.kind) {
    case Kind::bf16:
      load_rows_of<float, BFloat16>(view, batch, channel, token, count, width, out, ld);
      break;
    case Kind::f16:
      load_rows_of<float, Float16>(view, batch, channel, token, count, width, out, ld);
      break;
    default:
      load_rows_of<float, float>(view, batch, channel, token, count, width, out, ld);
  }
  __builtin_memset(out + count * ld, 0, size_t((padded(count) - count) * ld) * sizeof(float));
}

template <class T, class S>
inline void store_rows_of(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                          int64_t width, const T* in, int64_t ld) {
  constexpr int W = Simd<T>::W;
  S* p = static_cast<S*>(view.data) + batch * view.batch + channel * view.channel + token * view.token;
  for (int64_t t = 0; t < count; ++t, p += view.token) {
    for (int64_t j = 0; j < width; j += W) {
      store_row<T>(p + j, load<T>(in + t * ld + j), width - j < W ? int(width - j) : W);
    }
  }
}

inline void store_rows(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                       int64_t width, const double* in, int64_t ld) {
  store_rows_of<double, double>(view, batch, channel, token, count, width, in, ld);
}

inline void store_rows(const View& view, int64_t batch, int64_t channel, int64_t token, int64_t count,
                       int64_t width, const float* in, int64_t ld) {
  switch (view.kind) {
    case Kind::bf16:
      return store_rows_of<float, BFloat16>(view, batch, channel, token, count, width, in, ld);
    case Kind::f16:
      return store_rows_of<float, Float16>(view, batch, channel, token, count, width, in, ld);
    default:
      return store_rows_of<float, float>(view, batch, channel, token, count, width, in, ld);
  }
}

VITZOO_INLINE void load_one(const View& view, int64_t at, double* out) {
  *out = static_cast<const double*>(view.data)[at];
}
VITZOO_INLINE void load_one(const View& view, int64_t at, float* out) {
  switch (view.kind) {
    case Kind::bf16:
      *out = widen(static_cast<const BFloat16*>(view.data)[at]);
      break;
    case Kind::f16:
      *out = widen(static_cast<const Float16*>(view.data)[at]);
      break;
    default:
      *out = static_cast<const float*>(view.data)[at];
  }
}

// out (columns, rows) of in (rows, columns); both counts are multiples of W.
template <class T>
inline void transpose(const T* in, int64_t ld_in, int64_t rows, int64_t columns, T* out, int64_t ld_out) {
  constexpr int W = Simd<T>::W;
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      Vec<T> v[W];
      for (int r = 0; r < W; ++r) {
        v[r] = load<T>(in + (i + r) * ld_in + j);
      }
      transpose_step<T, 1>(v);
      for (int r = 0; r < W; ++r) {
        put<T>(out + (j + r) * ld_out + i, v[r]);
      }
    }
  }
}

// out_t = factor_t in_t, row by row; out may be in.
template <class T>
inline void scale_rows(const T* in, const T* factor, int64_t count, int64_t ld, T* out) {
  constexpr int W = Simd<T>::W;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t j = 0; j < ld; j += W) {
      put<T>(out + t * ld + j, load<T>(in + t * ld + j) * factor[t]);
    }
  }
}

// Scales the rows of `in`, writes each row's product with that of `with` and, unless null, adds them to `to`.
template <class T>
inline void scale_rows_dot(T* in, const T* factor, const T* with, int64_t count, int64_t ld, T* dots, T* to) {
  constexpr int W = Simd<T>::W;
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> sum{};
    for (int64_t j = 0; j < ld; j += W) {
      const Vec<T> v = load<T>(in + t * ld + j) * factor[t];
      put<T>(in + t * ld + j, v);
      sum += v * load<T>(with + t * ld + j);
      if (to != nullptr) {
        put<T>(to + t * ld + j, load<T>(to + t * ld + j) + v);
      }
    }
    dots[t] = sum_of<T>(sum);
  }
}

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
  to.batch = k.parts * k.seqlen * to.token;
  for (int64_t i = 0; i < it.count * ldk; i += W) {
    put<T>(b.dq + i, load<T>(b.dq + i) * T(k.scale));
  }
  to.data = static_cast<T*>(k.dq) + it.part * k.seqlen * to.token;
  store_rows(to, it.batch, it.group, it.token, it.count, k.dk, b.dq, ldk);
  to.data = static_cast<T*>(k.dk_out) + it.part * k.seqlen * to.token;
  store_rows(to, it.batch, it.group, it.token, it.count, k.dk, b.dk, ldk);
}

template <class T>
constexpr vitzoo::LinearScanSet kSet = {output<T>,
                                        advance<T, false, false>,
                                        advance<T, false, true>,
                                        advance<T, true, false>,
                                        advance<T, true, true>,
                                        backward<T>,
                                        pass_states<T>};
constexpr vitzoo::LinearScanKernels kKernels = {kSet<float>, kSet<double>};

}  // namespace
