// Causal convolution, forward and backward, for one instruction set and both layouts of cpu_layout.h.
//
// With H = width - 1, y_t = bias + sum_j taps_j x_(t - lead + j), j = 0 .. H. Forwards lead = H and the taps
// are the weights; in reverse lead = 0 and the taps are the weights in reverse. x stands for the samples with
// the initial states before (in reverse: behind) them, and zeros elsewhere.
#pragma once

#include "cpu_layout.h"

namespace {

using vitzoo::kConvBackwardTokens;
using vitzoo::kConvForwardTokens;

template <class T>
VITZOO_INLINE Vec<T> exp_of_minus(Vec<T> x) {  // its error is that of rounding x log2(e)
  return exp2_product<T, true>(x, broadcast<T>(T(-kLog2e)));
}

template <class T, class Layout, int K>
struct Taps {
  typename Layout::Unit unit[K];
  Vec<T> tap[K], bias;

  VITZOO_INLINE Taps(const CausalConv1dArgs& k, const ConvItem& item) {
    for (int j = 0; j < K; ++j) {
      unit[j] = Layout::parameter(k.weight, item, K, k.reverse ? K - 1 - j : j);
      tap[j] = Layout::spread(unit[j]);
    }
    bias = Layout::spread(Layout::parameter(k.bias, item, 1, 0));
  }

  // y of the token whose window starts at x.
  template <bool Silu>
  VITZOO_INLINE Vec<T> apply(const typename Layout::Unit* x) const {
    Vec<T> y = bias;
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      y += tap[j] * Layout::load(x + j);
    }
    return Silu ? y / (exp_of_minus<T>(y) + T(1)) : y;
  }
};

// Tokens by the states that have a buffer of their own: vectors, and not fewer than states.
template <class T>
constexpr int kEdge = Simd<T>::W > 4 ? Simd<T>::W : 4;

template <class T, class Layout, int K>
inline void write_final_states(const CausalConv1dArgs& k, const ConvItem& item) {
  constexpr int H = K - 1;
  if (k.reverse ? item.begin != 0 : item.end != k.seqlen) {
    return;
  }
  typename Layout::Unit samples[H], last[H];
  read_samples<T, Layout>(k, item, k.reverse ? 0 : k.seqlen - H, H, samples);
  for (int i = 0; i < H; ++i) {
    last[i] = samples[k.reverse ? H - 1 - i : i];
  }
  write_units<T, Layout>(k.final_states, item, 0, H, last);
}

// Tokens [begin, end) by way of buffers in the compute type.
template <class T, class Layout, int K, bool Silu>
inline void forward_buffered(const CausalConv1dArgs& k, const ConvItem& item, const Taps<T, Layout, K>& taps,
                             int64_t begin, int64_t end, void* scratch) {
  using Unit = typename Layout::Unit;
  constexpr int H = K - 1;
  Unit* const x = static_cast<Unit*>(scratch);
  Unit* const y = x + kConvForwardTokens + 64;  // vectors may end behind the last token
  for (int64_t token = begin; token < end; token += kConvForwardTokens) {
    const int64_t rest = end - token, count = rest < kConvForwardTokens ? rest : kConvForwardTokens;
    read_samples<T, Layout>(k, item, k.reverse ? token : token - H, count + H, x);
    for (int64_t t = 0; t < count; t += Layout::step) {
      Layout::store(y + t, taps.template apply<Silu>(x + t));
    }
    write_units<T, Layout>(k.out, item, token, count, y);
  }
}

// A channel whose elements are of the compute type is read in place, all but the vector that borders on the
// states. The last vector repeats tokens of the one before.
template <class T, int K, bool Silu>
VITZOO_INLINE void forward_in_place(const CausalConv1dArgs& k, const ConvItem& item,
                                    const Taps<T, Rows<T>, K>& taps) {
  using Layout = Rows<T>;
  constexpr int W = Layout::step, H = K - 1, edge = kEdge<T>;
  const T* const x = at<const T>(k.x, item, 0);
  T* const out = at<T>(k.out, item, 0);
  const T* const initial = at<const T>(k.initial, item, 0);
  T* const final_states = at<T>(k.final_states, item, 0);
  T border[edge + H + W];
  T* const before = border + (k.reverse ? edge : 0);
  for (int i = 0; i < H; ++i) {
    const int64_t t = k.reverse ? item.end + i : item.begin - H + i;
    const T state = initial == nullptr ? T(0) : initial[(k.reverse ? H - 1 - i : i) * k.initial.token];
    before[i] = t >= 0 && t < k.seqlen ? x[t] : state;
  }
  const int64_t first = k.reverse ? item.end - edge : item.begin;
  __builtin_memcpy(border + (k.reverse ? 0 : H), x + first, sizeof(T) * edge);
#pragma GCC unroll 4
  for (int i = 0; i < edge; i += W) {
    Layout::store(out + first + i, taps.template apply<Silu>(border + i));
  }
  const int64_t begin = k.reverse ? item.begin : item.begin + edge;
  const int64_t end = k.reverse ? item.end - edge : item.end;
  const T* const windows = x - (k.reverse ? 0 : H);
  int64_t t = begin;
  for (; t + W <= end; t += W) {
    Layout::store(out + t, taps.template apply<Silu>(windows + t));
  }
  if (t < end) {
    Layout::store(out + end - W, taps.template apply<Silu>(windows + end - W));
  }
  if (k.reverse ? item.begin == 0 : item.end == k.seqlen) {
    for (int i = 0; i < H; ++i) {
      final_states[i] = x[k.reverse ? H - 1 - i : k.seqlen - H + i];
    }
  }
}

template <class T, int K, bool Silu>
inline void forward_row(const CausalConv1dArgs& k, const ConvItem& item, void* scratch) {
  const Taps<T, Rows<T>, K> taps(k, item);
  const bool own_type = k.x.kind == Kind::f32 || k.x.kind == Kind::f64;
  if (own_type && item.end - item.begin >= kEdge<T> + Rows<T>::step) {
    forward_in_place<T, K, Silu>(k, item, taps);
  } else {
    forward_buffered<T, Rows<T>, K, Silu>(k, item, taps, item.begin, item.end, scratch);
    write_final_states<T, Rows<T>, K>(k, item);
  }
}

// Walks the tokens in the direction of the convolution, the last H samples in registers.
template <class T, class S, int K, bool Silu>
VITZOO_INLINE void walk_columns(const CausalConv1dArgs& k, const ConvItem& item, int lanes) {
  using Layout = Columns<T>;
  constexpr int H = K - 1;
  Vec<T> taps[K], before[H];
  for (int j = 0; j < K; ++j) {
    taps[j] = Layout::parameter(k.weight, item, K, j);
  }
  const Vec<T> bias = Layout::parameter(k.bias, item, 1, 0);
  read_samples<T, Layout>(k, item, k.reverse ? item.end : item.begin - H, H, before);
  if (k.reverse) {
    const Vec<T> first = before[0];
    before[0] = before[H - 1];
    before[H - 1] = first;
  }
  const int64_t start = k.reverse ? item.end - 1 : item.begin, sign = k.reverse ? -1 : 1;
  const S* x = at<const S>(k.x, item, start);
  S* out = at<S>(k.out, item, start);
  for (int64_t t = item.begin; t < item.end; ++t) {
    const Vec<T> now = load_row<T>(x, lanes);
    Vec<T> y = bias + taps[H] * now;
#pragma GCC unroll 4
    for (int j = 0; j < H; ++j) {
      y += taps[j] * before[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j + 1 < H; ++j) {
      before[j] = before[j + 1];
    }
    before[H - 1] = now;
    store_row<T>(out, Silu ? y / (exp_of_minus<T>(y) + T(1)) : y, lanes);
    x += sign * k.x.token;
    out += sign * k.out.token;
  }
}

template <class T, int K, bool Silu>
inline void forward_column(const CausalConv1dArgs& k, const ConvItem& item) {
  with_type<T>(k.x, [&]<class S>(S*) __attribute__((always_inline)) {
    if (item.lanes == Simd<T>::W) {
      walk_columns<T, S, K, Silu>(k, item, Simd<T>::W);
    } else {
      walk_columns<T, S, K, Silu>(k, item, item.lanes);
    }
  });
  write_final_states<T, Columns<T>, K>(k, item);
}

// The gradient of the initial states, in the chunk that borders on them. `d` holds the gradients of y of that
// chunk and of H tokens beyond its other end.
template <class T, class Layout, int K>
inline void initial_gradient(const CausalConv1dArgs& k, const ConvItem& item, const Taps<T, Layout, K>& taps,
                             const typename Layout::Unit* d, int64_t count) {
  constexpr int H = K - 1;
  typename Layout::Unit out[H];
  for (int m = 0; m < H; ++m) {  // m-th state from the far end
    typename Layout::Unit sum{};
    for (int j = 0; j <= m; ++j) {
      sum += k.reverse ? taps.unit[H - j] * d[count + H - 1 - m + j] : taps.unit[j] * d[m - j];
    }
    out[m] = sum;
  }
  write_units<T, Layout>(k.dinitial, item, 0, H, out);
}

// Turns gradients of out into those of y, [0, count) of d; y's windows start at x.
template <class T, class Layout, int K>
VITZOO_INLINE void through_silu(const Taps<T, Layout, K>& taps, const typename Layout::Unit* x, int64_t count,
                                typename Layout::Unit* d) {
  for (int64_t i = 0; i < count; i += Layout::step) {
    const Vec<T> y = taps.template apply<false>(x + i), gate = T(1) / (exp_of_minus<T>(y) + T(1));
    Layout::store(d + i, Layout::load(d + i) * gate * (y * (T(1) - gate) + T(1)));
  }
}

template <class T, class Layout, int K, bool Silu>
inline void backward_item(const CausalConv1dArgs& k, const ConvItem& item, void* scratch) {
  using Unit = typename Layout::Unit;
  constexpr int H = K - 1, pad = 64;              // vectors may end behind the last token
  Unit* const x = static_cast<Unit*>(scratch);    // x_(token - H) .. , count + 2 H of them
  Unit* const d = x + kConvBackwardTokens + pad;  // gradient of y, from y_(token - H + lead), count + H
  Unit* const dx = d + kConvBackwardTokens + pad;
  const Taps<T, Layout, K> taps(k, item);
  Vec<T> dtaps[K], dbias{};
  for (int j = 0; j < K; ++j) {
    dtaps[j] = Vec<T>{};
  }
  for (int64_t token = item.begin; token < item.end; token += kConvBackwardTokens) {
    const int64_t rest = item.end - token, count = rest < kConvBackwardTokens ? rest : kConvBackwardTokens;
    const int64_t first = k.reverse ? token - H : token;
    read_samples<T, Layout>(k, item, token - H, count + 2 * H, x);
    read_clipped<T, Layout>(k, k.dout, item, first, count + H, d);
    for (int i = 0; i < Layout::step - 1; ++i) {
      x[count + 2 * H + i] = d[count + H + i] = Unit{};
    }
    if (Silu) {
      through_silu<T, Layout, K>(taps, x, count + H, d);
      for (int64_t i = 0; i < H; ++i) {  // no NaN of y may come in from tokens that do not exist
        const int64_t far = k.reverse ? i : count + i;
        if (first + far < 0 || first + far >= k.seqlen) {
          d[far] = Unit{};
        }
      }
    }
    const int64_t own = k.reverse ? H : 0;  // where the chunk's own gradients start in d
    for (int64_t i = 0; i < count; i += Layout::step) {
      const Vec<T> dy = Layout::load_part(d + own + i, count - i);
      dbias += dy;
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) {
        dtaps[j] += dy * Layout::load(x + own + i + j);
      }
    }
    for (int64_t i = 0; i < count; i += Layout::step) {
      Vec<T> sum{};
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) {
        sum += taps.tap[j] * Layout::load(d + i + H - j);
      }
      Layout::store(dx + i, sum);
    }
    write_units<T, Layout>(k.dx, item, token, count, dx);
    if (k.dinitial.data != nullptr && (k.reverse ? token + count == k.seqlen : token == 0)) {
      initial_gradient<T, Layout, K>(k, item, taps, d, count);
    }
  }
  const int64_t row = (item.batch * k.parts + item.part) * k.dim;
  for (int j = 0; j < K; ++j) {
    Layout::store_parameter(static_cast<T*>(k.dweight) + row * K, item, K, k.reverse ? K - 1 - j : j,
                            Layout::total(dtaps[j]));
  }
  if (k.dbias != nullptr) {
    Layout::store_parameter(static_cast<T*>(k.dbias) + row, item, 1, 0, Layout::total(dbias));
  }
}

template <class T, int K, bool Silu>
inline void forward_of(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.columns) {
    for_items<Columns<T>>(k, begin, end, [&](const ConvItem& item) { forward_column<T, K, Silu>(k, item); });
  } else {
    for_items<Rows<T>>(k, begin, end,
                       [&](const ConvItem& item) { forward_row<T, K, Silu>(k, item, scratch); });
  }
}

template <class T, int K, bool Silu>
inline void backward_of(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.columns) {
    for_items<Columns<T>>(k, begin, end, [&](const ConvItem& item) {
      backward_item<T, Columns<T>, K, Silu>(k, item, scratch);
    });
  } else {
    for_items<Rows<T>>(k, begin, end,
                       [&](const ConvItem& item) { backward_item<T, Rows<T>, K, Silu>(k, item, scratch); });
  }
}

template <class T, int K>
void forward_width(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  k.silu ? forward_of<T, K, true>(k, begin, end, scratch) : forward_of<T, K, false>(k, begin, end, scratch);
}

template <class T, int K>
void backward_width(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  k.silu ? backward_of<T, K, true>(k, begin, end, scratch) : backward_of<T, K, false>(k, begin, end, scratch);
}

template <class T>
void forward(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  const auto pass = k.width == 2   ? forward_width<T, 2>
                    : k.width == 3 ? forward_width<T, 3>
                                   : forward_width<T, 4>;
  pass(k, begin, end, scratch);
}

template <class T>
void backward(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  const auto pass = k.width == 2   ? backward_width<T, 2>
                    : k.width == 3 ? backward_width<T, 3>
                                   : backward_width<T, 4>;
  pass(k, begin, end, scratch);
}

constexpr vitzoo::CausalConv1dKernels kKernels = {forward<float>, forward<double>, backward<float>,
                                                  backward<double>};

}  // namespace
