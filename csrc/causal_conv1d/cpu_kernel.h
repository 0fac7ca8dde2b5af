// Causal convolution, forward and backward, for one instruction set. The lanes of a vector are channels, and
// a vector is a token, whichever of the two axes lies side by side in memory: tiles are transposed in
// registers as they are loaded and stored.
//
// With H = width - 1, y_t = bias + sum_j taps_j x_(t - lead + j), j = 0 .. H. Forwards lead = H and the taps
// are the weights; in reverse lead = 0 and the taps are the weights in reverse. x stands for the samples with
// the initial states before (in reverse: behind) them, and zeros elsewhere.
#pragma once

#include "../common/simd.h"
#include "cpu_args.h"

namespace {

using vitzoo::CausalConv1dArgs;
using vitzoo::kConvBackwardTokens;
using vitzoo::kConvChannels;
using vitzoo::kConvForwardTokens;
using vitzoo::kConvMaxWidth;

struct ConvTile {
  int64_t batch, part, channel;
  int width;           // lanes in use
  int64_t begin, end;  // tokens of the part
};

// Calls f(tile) for the tiles of work items [begin, end).
template <class T, class F>
VITZOO_INLINE void for_tiles(const CausalConv1dArgs& k, int64_t begin, int64_t end, const F& f) {
  constexpr int W = Simd<T>::W;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item % k.tiles * kConvChannels, part = item / k.tiles % k.parts,
                  batch = item / k.tiles / k.parts;
    const int64_t stop = start + kConvChannels < k.dim ? start + kConvChannels : k.dim;
    const int64_t first = part * k.part_tokens, last = first + k.part_tokens;
    for (int64_t c = start; c < stop; c += W) {
      f(ConvTile{batch, part, c, stop - c < W ? int(stop - c) : W, first, last < k.seqlen ? last : k.seqlen});
    }
  }
}

// One element of each lane's row of `stride` elements.
template <class T>
VITZOO_INLINE Vec<T> load_lanes(const void* base, const ConvTile& tile, int64_t stride, int64_t offset) {
  constexpr int W = Simd<T>::W;
  T values[W] = {};
  if (base != nullptr) {
    const T* const p = static_cast<const T*>(base) + tile.channel * stride + offset;
    for (int r = 0; r < tile.width; ++r) {
      values[r] = p[r * stride];
    }
  }
  Vec<T> out;
  __builtin_memcpy(&out, values, sizeof(out));
  return out;
}

template <class T>
VITZOO_INLINE void store_lanes(void* base, const ConvTile& tile, int64_t stride, int64_t offset, Vec<T> v) {
  constexpr int W = Simd<T>::W;
  T values[W];
  __builtin_memcpy(values, &v, sizeof(v));
  T* const p = static_cast<T*>(base) + tile.channel * stride + offset;
  for (int r = 0; r < tile.width; ++r) {
    p[r * stride] = values[r];
  }
}

template <class T, class S>
inline void store_rows_of(const View& view, const ConvTile& tile, int64_t token, int64_t count,
                          const Vec<T>* in) {
  S* const p = static_cast<S*>(view.data) + tile.batch * view.batch + tile.channel + token * view.token;
  for (int64_t t = 0; t < count; ++t) {
    store_row<T>(p + t * view.token, in[t], tile.width);
  }
}

// Stores a tile whose tokens or whose channels lie side by side.
template <class T>
inline void store_any(const View& view, const ConvTile& tile, int64_t token, int64_t count,
                      const Vec<T>* in) {
  if (view.token == 1) {
    return store_tile(view, tile.batch, tile.channel, tile.width, token, count, in);
  }
  if constexpr (sizeof(T) == 8) {
    store_rows_of<T, T>(view, tile, token, count, in);
  } else if (view.kind == Kind::bf16) {
    store_rows_of<T, BFloat16>(view, tile, token, count, in);
  } else if (view.kind == Kind::f16) {
    store_rows_of<T, Float16>(view, tile, token, count, in);
  } else {
    store_rows_of<T, T>(view, tile, token, count, in);
  }
}

// Loads tokens [from, from + count) of a view, zeros where there are none.
template <class T>
inline void load_clipped(const CausalConv1dArgs& k, const View& view, const ConvTile& tile, int64_t from,
                         int64_t count, Vec<T>* out) {
  const int64_t first = from < 0 ? (-from < count ? -from : count) : 0;
  const int64_t rest = k.seqlen - from, last = rest < count ? rest : count;
  for (int64_t i = 0; i < first; ++i) {
    out[i] = Vec<T>{};
  }
  if (last > first) {
    load_tile(view, tile.batch, tile.channel, tile.width, from + first, last - first, out + first);
  }
  for (int64_t i = last > first ? last : first; i < count; ++i) {
    out[i] = Vec<T>{};
  }
}

// The same of x, with the initial states at their place.
template <class T>
inline void load_samples(const CausalConv1dArgs& k, const ConvTile& tile, int64_t from, int64_t count,
                         Vec<T>* out) {
  load_clipped<T>(k, k.x, tile, from, count, out);
  const int64_t H = k.width - 1;
  if (k.initial.data == nullptr || (k.reverse ? from + count <= k.seqlen : from >= 0)) {
    return;
  }
  Vec<T> states[kConvMaxWidth];
  load_tile(k.initial, tile.batch, tile.channel, tile.width, 0, H, states);
  for (int64_t m = 0; m < H; ++m) {
    const int64_t i = (k.reverse ? k.seqlen + H - 1 - m : m - H) - from;
    if (i >= 0 && i < count) {
      out[i] = states[m];
    }
  }
}

template <class T>
VITZOO_INLINE Vec<T> quick_sigmoid(Vec<T> x) {  // its error is that of rounding x log2(e)
  return T(1) / (exp2_product<T, true>(x, broadcast<T>(T(-kLog2e))) + T(1));
}

template <class T, int K>
VITZOO_INLINE Vec<T> convolve(const Vec<T>* x, const Vec<T>* taps, Vec<T> bias) {
  Vec<T> sum = bias;
#pragma GCC unroll 4
  for (int j = 0; j < K; ++j) {
    sum += x[j] * taps[j];
  }
  return sum;
}

template <class T, int K>
VITZOO_INLINE void load_taps(const CausalConv1dArgs& k, const ConvTile& tile, Vec<T>* taps) {
  for (int j = 0; j < K; ++j) {
    taps[j] = load_lanes<T>(k.weight, tile, K, k.reverse ? K - 1 - j : j);
  }
}

// Walks the part's chunks in the direction of the convolution, so that the last H samples of a chunk serve
// the next.
template <class T, int K, bool Silu>
inline void forward_pass(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  typedef Vec<T> V;
  constexpr int H = K - 1;
  V* const x = static_cast<V*>(scratch);
  V* const y = x + kConvForwardTokens + H;
  for_tiles<T>(k, begin, end, [&](const ConvTile& tile) __attribute__((always_inline)) {
    V taps[K], carry[H];
    load_taps<T, K>(k, tile, taps);
    const V bias = load_lanes<T>(k.bias, tile, 1, 0);
    load_samples<T>(k, tile, k.reverse ? tile.end : tile.begin - H, H, carry);
    const int64_t chunks = (tile.end - tile.begin + kConvForwardTokens - 1) / kConvForwardTokens;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t token = tile.begin + (k.reverse ? chunks - 1 - chunk : chunk) * kConvForwardTokens;
      const int64_t rest = tile.end - token, count = rest < kConvForwardTokens ? rest : kConvForwardTokens;
      load_tile(k.x, tile.batch, tile.channel, tile.width, token, count, k.reverse ? x : x + H);
      V* const before = k.reverse ? x + count : x;
      V* const behind = k.reverse ? x : x + count;
      for (int i = 0; i < H; ++i) {
        before[i] = carry[i];
      }
      for (int i = 0; i < H; ++i) {
        carry[i] = behind[i];
      }
      for (int64_t t = 0; t < count; ++t) {
        const V sum = convolve<T, K>(x + t, taps, bias);
        y[t] = Silu ? sum * quick_sigmoid<T>(sum) : sum;
      }
      store_any<T>(k.out, tile, token, count, y);
    }
    if (k.reverse ? tile.begin == 0 : tile.end == k.seqlen) {
      V last[H];
      for (int i = 0; i < H; ++i) {
        last[i] = carry[k.reverse ? H - 1 - i : i];
      }
      store_any<T>(k.final_states, tile, 0, H, last);
    }
  });
}

// The gradient of the initial states, in the chunk that borders on them. `d` holds the gradients of y of that
// chunk and of H tokens beyond its other end.
template <class T, int K>
inline void initial_gradient(const CausalConv1dArgs& k, const ConvTile& tile, const Vec<T>* taps,
                             const Vec<T>* d, int64_t count) {
  constexpr int H = K - 1;
  Vec<T> out[H];
  for (int m = 0; m < H; ++m) {  // m-th state from the far end
    Vec<T> sum{};
    for (int j = 0; j <= m; ++j) {
      sum += k.reverse ? taps[H - j] * d[count + H - 1 - m + j] : taps[j] * d[m - j];
    }
    out[m] = sum;
  }
  store_any<T>(k.dinitial, tile, 0, H, out);
}

template <class T, int K, bool Silu>
inline void backward_pass(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  typedef Vec<T> V;
  constexpr int H = K - 1;
  V* const x = static_cast<V*>(scratch);         // x_(token - H) .. , count + 2 H of them
  V* const d = x + kConvBackwardTokens + 2 * H;  // gradient of y, from y_(token - H + lead), count + H
  V* const dx = d + kConvBackwardTokens + H;
  for_tiles<T>(k, begin, end, [&](const ConvTile& tile) __attribute__((always_inline)) {
    V taps[K], dtaps[K], dbias{};
    load_taps<T, K>(k, tile, taps);
    const V bias = load_lanes<T>(k.bias, tile, 1, 0);
    for (int j = 0; j < K; ++j) {
      dtaps[j] = V{};
    }
    for (int64_t token = tile.begin; token < tile.end; token += kConvBackwardTokens) {
      const int64_t rest = tile.end - token, count = rest < kConvBackwardTokens ? rest : kConvBackwardTokens;
      const int64_t first = k.reverse ? token - H : token;
      load_samples<T>(k, tile, token - H, count + 2 * H, x);
      load_clipped<T>(k, k.dout, tile, first, count + H, d);
      if (Silu) {
        for (int64_t i = 0; i < count + H; ++i) {
          const V y = convolve<T, K>(x + i, taps, bias), gate = quick_sigmoid<T>(y);
          d[i] = d[i] * gate * (y * (T(1) - gate) + T(1));
        }
        for (int64_t i = 0; i < H; ++i) {  // no NaN of y may come in from tokens that do not exist
          const int64_t far = k.reverse ? i : count + i;
          if (first + far < 0 || first + far >= k.seqlen) {
            d[far] = V{};
          }
        }
      }
      const int64_t own = k.reverse ? H : 0;  // where the chunk's own gradients start in d
      for (int64_t i = own; i < own + count; ++i) {
        dbias += d[i];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) {
          dtaps[j] += d[i] * x[i + j];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        V sum{};
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) {
          sum += taps[j] * d[i + H - j];
        }
        dx[i] = sum;
      }
      store_any<T>(k.dx, tile, token, count, dx);
      if (k.dinitial.data != nullptr && (k.reverse ? token + count == k.seqlen : token == 0)) {
        initial_gradient<T, K>(k, tile, taps, d, count);
      }
    }
    const int64_t row = (tile.batch * k.parts + tile.part) * k.dim;
    for (int j = 0; j < K; ++j) {
      store_lanes<T>(static_cast<T*>(k.dweight) + row * K, tile, K, k.reverse ? K - 1 - j : j, dtaps[j]);
    }
    if (k.dbias != nullptr) {
      store_lanes<T>(static_cast<T*>(k.dbias) + row, tile, 1, 0, dbias);
    }
  });
}

template <class T, int K>
void forward_of(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  k.silu ? forward_pass<T, K, true>(k, begin, end, scratch)
         : forward_pass<T, K, false>(k, begin, end, scratch);
}

template <class T, int K>
void backward_of(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  k.silu ? backward_pass<T, K, true>(k, begin, end, scratch)
         : backward_pass<T, K, false>(k, begin, end, scratch);
}

template <class T>
void forward(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  const auto pass = k.width == 2 ? forward_of<T, 2> : k.width == 3 ? forward_of<T, 3> : forward_of<T, 4>;
  pass(k, begin, end, scratch);
}

template <class T>
void backward(const CausalConv1dArgs& k, int64_t begin, int64_t end, void* scratch) {
  const auto pass = k.width == 2 ? backward_of<T, 2> : k.width == 3 ? backward_of<T, 3> : backward_of<T, 4>;
  pass(k, begin, end, scratch);
}

constexpr vitzoo::CausalConv1dKernels kKernels = {forward<float>, forward<double>, backward<float>,
                                                  backward<double>};

}  // namespace
