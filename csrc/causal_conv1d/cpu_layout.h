// The two layouts of the causal convolution. `Rows`: the tokens of a channel lie side by side, the lanes of a
// vector are tokens, and a buffer holds one channel as plain numbers. `Columns`: the channels of a token lie
// side by side, the lanes are channels, and a buffer holds one vector a token. The kernels are written once
// over both.
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::CausalConv1dArgs;
using vitzoo::kConvChannels;
using vitzoo::kConvMaxWidth;

struct ConvItem {
  int64_t batch, part, channel;
  int lanes;           // channels of it: 1 in Rows, up to the vector's width in Columns
  int64_t begin, end;  // tokens of the part
};

template <class S>
VITZOO_INLINE S* at(const View& view, const ConvItem& item, int64_t token) {
  return view.data == nullptr ? nullptr
                              : static_cast<S*>(view.data) + item.batch * view.batch +
                                    item.channel * view.channel + token * view.token;
}

// Calls f(static_cast<S*>(nullptr)) with the type of the view's elements.
template <class T, class F>
VITZOO_INLINE void with_type(const View& view, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<T*>(nullptr));
  } else if (view.kind == Kind::bf16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (view.kind == Kind::f16) {
    f(static_cast<Float16*>(nullptr));
  } else {
    f(static_cast<T*>(nullptr));
  }
}

template <class T>
struct Rows {
  using Unit = T;
  static constexpr int step = Simd<T>::W;  // units a vector spans
  static constexpr int channels = 1;       // of an item

  static VITZOO_INLINE Vec<T> spread(T x) { return broadcast<T>(x); }
  static VITZOO_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static VITZOO_INLINE void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof(v)); }
  // The first `count` units, zeros behind them.
  static VITZOO_INLINE Vec<T> load_part(const T* p, int64_t count) {
    return load_row<T>(p, count < step ? int(count) : step);
  }
  static VITZOO_INLINE T total(Vec<T> v) {
    T sum = 0;
    for (int i = 0; i < step; ++i) {
      sum += v[i];
    }
    return sum;
  }
  static VITZOO_INLINE T parameter(const void* base, const ConvItem& item, int64_t stride, int64_t offset) {
    return base == nullptr ? T(0) : static_cast<const T*>(base)[item.channel * stride + offset];
  }
  static VITZOO_INLINE void store_parameter(void* base, const ConvItem& item, int64_t stride, int64_t offset,
                                            T x) {
    static_cast<T*>(base)[item.channel * stride + offset] = x;
  }
  template <class S>
  static VITZOO_INLINE void read(const View& view, const ConvItem& item, int64_t token, int64_t count,
                                 T* out) {
    const S* const p = at<const S>(view, item, token);
    for (int64_t t = 0; t < count; ++t) {
      out[t] = widen(p[t * view.token]);
    }
  }
  template <class S>
  static VITZOO_INLINE void write(const View& view, const ConvItem& item, int64_t token, int64_t count,
                                  const T* in) {
    S* const p = at<S>(view, item, token);
    for (int64_t t = 0; t < count; ++t) {
      narrow(in[t], p + t * view.token);
    }
  }
};

template <class T>
struct Columns {
  using Unit = Vec<T>;
  static constexpr int step = 1;
  static constexpr int channels = Simd<T>::W;

  static VITZOO_INLINE Vec<T> spread(Vec<T> x) { return x; }
  static VITZOO_INLINE Vec<T> load(const Vec<T>* p) { return *p; }
  static VITZOO_INLINE void store(Vec<T>* p, Vec<T> v) { *p = v; }
  static VITZOO_INLINE Vec<T> load_part(const Vec<T>* p, int64_t) { return *p; }
  static VITZOO_INLINE Vec<T> total(Vec<T> v) { return v; }
  static VITZOO_INLINE Vec<T> parameter(const void* base, const ConvItem& item, int64_t stride,
                                        int64_t offset) {
    T values[Simd<T>::W] = {};
    if (base != nullptr) {
      const T* const p = static_cast<const T*>(base) + item.channel * stride + offset;
      for (int r = 0; r < item.lanes; ++r) {
        values[r] = p[r * stride];
      }
    }
    Vec<T> out;
    __builtin_memcpy(&out, values, sizeof(out));
    return out;
  }
  static VITZOO_INLINE void store_parameter(void* base, const ConvItem& item, int64_t stride, int64_t offset,
                                            Vec<T> v) {
    T* const p = static_cast<T*>(base) + item.channel * stride + offset;
    for (int r = 0; r < item.lanes; ++r) {
      p[r * stride] = v[r];
    }
  }
  template <class S>
  static VITZOO_INLINE void read(const View& view, const ConvItem& item, int64_t token, int64_t count,
                                 Vec<T>* out) {
    for (int64_t t = 0; t < count; ++t) {
      const S* const p = at<const S>(view, item, token + t);
      if (view.channel == 1) {
        out[t] = load_row<T>(p, item.lanes);
      } else {  // states
        out[t] = Vec<T>{};
        for (int r = 0; r < item.lanes; ++r) {
          out[t][r] = widen(p[r * view.channel]);
        }
      }
    }
  }
  template <class S>
  static VITZOO_INLINE void write(const View& view, const ConvItem& item, int64_t token, int64_t count,
                                  const Vec<T>* in) {
    for (int64_t t = 0; t < count; ++t) {
      S* const p = at<S>(view, item, token + t);
      if (view.channel == 1) {
        store_row<T>(p, in[t], item.lanes);
      } else {
        for (int r = 0; r < item.lanes; ++r) {
          narrow(in[t][r], p + r * view.channel);
        }
      }
    }
  }
};

// Calls f(item) for every channel (Rows) or vector of channels (Columns) of work items [begin, end).
template <class Layout, class F>
VITZOO_INLINE void for_items(const CausalConv1dArgs& k, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t start = i % k.tiles * kConvChannels, part = i / k.tiles % k.parts,
                  batch = i / k.tiles / k.parts;
    const int64_t stop = start + kConvChannels < k.dim ? start + kConvChannels : k.dim;
    const int64_t first = part * k.part_tokens, last = first + k.part_tokens;
    for (int64_t c = start; c < stop; c += Layout::channels) {
      const int lanes = stop - c < Layout::channels ? int(stop - c) : Layout::channels;
      f(ConvItem{batch, part, c, lanes, first, last < k.seqlen ? last : k.seqlen});
    }
  }
}

// Reads tokens [from, from + count) of a view, zeros where there are none.
template <class T, class Layout>
inline void read_clipped(const CausalConv1dArgs& k, const View& view, const ConvItem& item, int64_t from,
                         int64_t count, typename Layout::Unit* out) {
  const int64_t first = from < 0 ? (-from < count ? -from : count) : 0;
  const int64_t rest = k.seqlen - from, last = rest < count ? rest : count;
  for (int64_t i = 0; i < first; ++i) {
    out[i] = typename Layout::Unit{};
  }
  if (last > first) {
    with_type<T>(view, [&]<class S>(S*) __attribute__((always_inline)) {
      Layout::template read<S>(view, item, from + first, last - first, out + first);
    });
  }
  for (int64_t i = last > first ? last : first; i < count; ++i) {
    out[i] = typename Layout::Unit{};
  }
}

// The same of x, with the initial states at their place.
template <class T, class Layout>
inline void read_samples(const CausalConv1dArgs& k, const ConvItem& item, int64_t from, int64_t count,
                         typename Layout::Unit* out) {
  read_clipped<T, Layout>(k, k.x, item, from, count, out);
  const int64_t H = k.width - 1;
  if (k.initial.data == nullptr || (k.reverse ? from + count <= k.seqlen : from >= 0)) {
    return;
  }
  typename Layout::Unit states[kConvMaxWidth];
  with_type<T>(k.initial, [&]<class S>(S*) __attribute__((always_inline)) {
    Layout::template read<S>(k.initial, item, 0, H, states);
  });
  for (int64_t m = 0; m < H; ++m) {
    const int64_t i = (k.reverse ? k.seqlen + H - 1 - m : m - H) - from;
    if (i >= 0 && i < count) {
      out[i] = states[m];
    }
  }
}

template <class T, class Layout>
inline void write_units(const View& view, const ConvItem& item, int64_t token, int64_t count,
                        const typename Layout::Unit* in) {
  with_type<T>(view, [&]<class S>(S*) __attribute__((always_inline)) {
    Layout::template write<S>(view, item, token, count, in);
  });
}

}  // namespace
