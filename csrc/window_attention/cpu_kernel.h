// Window attention, forward and backward, for one instruction set. A window's rows are read where they stand
// in the map: a table of their addresses takes the place of the partition and of the cyclic shift.
#pragma once

#include "../common/attention.h"
#include "cpu_args.h"

namespace {

using vitzoo::MapView;
using vitzoo::WindowAttentionArgs;

// Where window-space coordinate i of one axis lies in the map, -1 for padding; and its region for the mask.
struct Axis {
  int64_t size, window, shift, padded;
  bool roll_first;
  Axis(int64_t size, int64_t window, int64_t shift, bool roll_first)
      : size(size),
        window(window),
        shift(shift),
        padded((size + window - 1) / window * window),
        roll_first(roll_first) {}
  VITZOO_INLINE int64_t source(int64_t i) const {
    if (roll_first) {
      return i < size ? (i + shift) % size : -1;
    }
    const int64_t at = i + shift < padded ? i + shift : i + shift - padded;
    return at < size ? at : -1;
  }
  VITZOO_INLINE int region(int64_t i) const {
    return shift == 0 || i < padded - window ? 0 : i < padded - shift ? 1 : 2;
  }
};

// The rows of one window: addresses in three maps at most, and regions.
template <class T>
struct Window {
  int64_t tokens;
  const void** qkv;
  const void** other_in;  // dout, or null forward
  void** out;             // out, or dqkv; null for padding
  T* region;
  bool masked;
};

VITZOO_INLINE int64_t bytes_of(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

VITZOO_INLINE char* row_of(const MapView& map, int64_t b, int64_t y, int64_t x) {
  return static_cast<char*>(map.data) + (b * map.batch + y * map.row + x * map.column) * bytes_of(map.kind);
}

template <class T>
inline void find_rows(const WindowAttentionArgs& k, const MapView& out, int64_t item, const Window<T>& w,
                      bool* masked) {
  const Axis vertical(k.height, k.window_h, k.shift_h, k.roll_first);
  const Axis horizontal(k.width, k.window_w, k.shift_w, k.roll_first);
  const int64_t across = horizontal.padded / k.window_w, windows = vertical.padded / k.window_h * across;
  const int64_t b = item / windows, y0 = item % windows / across * k.window_h,
                x0 = item % across * k.window_w;
  bool mixed = false;
  for (int64_t i = 0; i < w.tokens; ++i) {
    const int64_t yi = y0 + i / k.window_w, xi = x0 + i % k.window_w;
    const int64_t y = vertical.source(yi), x = horizontal.source(xi);
    const bool inside = y >= 0 && x >= 0;
    w.qkv[i] = inside ? row_of(k.qkv, b, y, x) : static_cast<const char*>(k.pad);
    w.out[i] = inside ? row_of(out, b, y, x) : nullptr;
    if (w.other_in != nullptr) {
      w.other_in[i] = inside ? row_of(k.dout, b, y, x) : nullptr;
    }
    w.region[i] = T(3 * vertical.region(yi) + horizontal.region(xi));
    mixed = mixed || w.region[i] != w.region[0];
  }
  *masked = mixed;
}

template <class T>
Window<T> make_window(Arena<T>& arena, int64_t tokens, bool backward) {
  static_assert(sizeof(T) <= sizeof(void*), "");
  const int64_t cells = tokens * int64_t(sizeof(void*) / sizeof(T));
  Window<T> w{};
  w.tokens = tokens;
  w.qkv = reinterpret_cast<const void**>(arena.take(cells));
  w.out = reinterpret_cast<void**>(arena.take(cells));
  w.other_in = backward ? reinterpret_cast<const void**>(arena.take(cells)) : nullptr;
  w.region = arena.take(tokens + kQueries);
  for (int64_t i = 0; i < tokens + kQueries; ++i) {
    w.region[i] = T(0);
  }
  return w;
}

// Queries in equal blocks of at most kQueries.
VITZOO_INLINE int64_t block_of(int64_t tokens, int64_t lanes) {
  const int64_t blocks = (tokens + kQueries - 1) / kQueries;
  const int64_t block = (tokens + blocks - 1) / blocks;
  return (block + lanes - 1) / lanes * lanes;
}

template <class T>
inline Extras<T> extras_of(const WindowAttentionArgs& k, const Window<T>& w, bool masked, int64_t head,
                           int64_t q0) {
  Extras<T> extras;
  extras.ldb = k.bias_ld;
  if (k.bias_t != nullptr) {
    extras.bias = static_cast<const T*>(k.bias_t) + head * w.tokens * k.bias_ld + q0;
  }
  if (masked) {
    extras.key_region = w.region;
    extras.query_region = w.region + q0;
  }
  return extras;
}

template <class T>
inline void bias_pass(const WindowAttentionArgs& k, int64_t begin, int64_t end, void* memory) {
  const int64_t tokens = k.window_h * k.window_w;
  const void** const rows = static_cast<const void**>(memory);
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t i = 0; i < tokens; ++i) {
      rows[i] = static_cast<const T*>(k.bias) + (head * tokens + i) * tokens;
    }
    pack_columns<T>({rows, 0, sizeof(T) == 8 ? Kind::f64 : Kind::f32}, tokens, tokens, T(kLog2e),
                    static_cast<T*>(k.bias_t) + head * tokens * k.bias_ld, k.bias_ld);
  }
}

template <class T>
inline void forward_pass(const WindowAttentionArgs& k, int64_t begin, int64_t end, void* memory) {
  const int64_t tokens = k.window_h * k.window_w, d = k.head_dim, channels = k.heads * d;
  Arena<T> arena{static_cast<T*>(memory)};
  const Window<T> w = make_window(arena, tokens, false);
  T* const keys = arena.take(tokens * round_up<T>(d));
  T* const values = arena.take(tokens * round_up<T>(d));
  const ForwardScratch<T> scratch(arena, d);
  const int64_t block = block_of(tokens, Simd<T>::W);
  for (int64_t item = begin; item < end; ++item) {
    bool masked;
    find_rows(k, k.out, item, w, &masked);
    for (int64_t head = 0; head < k.heads; ++head) {
      pack_rows<T>({w.qkv, channels + head * d, k.qkv.kind}, tokens, d, keys);
      pack_rows<T>({w.qkv, 2 * channels + head * d, k.qkv.kind}, tokens, d, values);
      for (int64_t q0 = 0; q0 < tokens; q0 += block) {
        const int64_t count = tokens - q0 < block ? tokens - q0 : block;
        attend<T>(scratch, {w.qkv + q0, head * d, k.qkv.kind}, count, keys, values, tokens, d, T(k.scale),
                  extras_of(k, w, masked, head, q0), {w.out + q0, head * d, k.out.kind});
      }
    }
  }
}

// Adds the gradients of keys or values at padded tokens, (tokens, dp), to those of the padding's values.
template <class T>
inline void add_padding(const Window<T>& w, const T* rows, int64_t d, T factor, T* sum) {
  const int64_t dp = round_up<T>(d);
  for (int64_t i = 0; i < w.tokens; ++i) {
    if (w.out[i] == nullptr) {
      for (int64_t c = 0; c < d; ++c) {
        sum[c] += factor * rows[i * dp + c];
      }
    }
  }
}

template <class T>
inline void backward_pass(const WindowAttentionArgs& k, int64_t begin, int64_t end, void* memory) {
  const int64_t tokens = k.window_h * k.window_w, d = k.head_dim, channels = k.heads * d;
  const int64_t rows = tokens * round_up<T>(d);
  Arena<T> arena{static_cast<T*>(memory)};
  const Window<T> w = make_window(arena, tokens, true);
  T *const keys = arena.take(rows), *const values = arena.take(rows);
  T *const dkeys = arena.take(rows), *const dvalues = arena.take(rows);
  const BackwardScratch<T> scratch(arena, tokens, d);
  const int64_t block = block_of(tokens, Simd<T>::W);
  const int64_t windows = k.batch * vitzoo::window_attention_windows(k);
  const T scale = T(k.scale);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / k.heads, head = item % k.heads;
    T* const dbias = k.dbias == nullptr ? nullptr : static_cast<T*>(k.dbias) + item * tokens * k.bias_ld;
    T* const dpad = k.dpad == nullptr ? nullptr : static_cast<T*>(k.dpad) + part * 3 * channels + head * d;
    if (dbias != nullptr) {
      zero(dbias, tokens * k.bias_ld);
    }
    for (int i = 0; dpad != nullptr && i < 3; ++i) {
      zero(dpad + i * channels, d);
    }
    for (int64_t window = part * windows / k.parts; window < (part + 1) * windows / k.parts; ++window) {
      bool masked;
      find_rows(k, k.dqkv, window, w, &masked);
      pack_rows<T>({w.qkv, channels + head * d, k.qkv.kind}, tokens, d, keys);
      pack_rows<T>({w.qkv, 2 * channels + head * d, k.qkv.kind}, tokens, d, values);
      zero(dkeys, rows);
      zero(dvalues, rows);
      for (int64_t q0 = 0; q0 < tokens; q0 += block) {
        const int64_t count = tokens - q0 < block ? tokens - q0 : block;
        const Gradients<T> gradients{dkeys, dvalues, dbias == nullptr ? nullptr : dbias + q0};
        attend_backward<T>(scratch, {w.qkv + q0, head * d, k.qkv.kind},
                           {w.other_in + q0, head * d, k.dout.kind}, count, keys, values, tokens, d, scale,
                           extras_of(k, w, masked, head, q0), gradients, {w.out + q0, head * d, k.dqkv.kind});
      }
      unpack_rows<T>(dkeys, tokens, d, scale, {w.out, channels + head * d, k.dqkv.kind});
      unpack_rows<T>(dvalues, tokens, d, T(1), {w.out, 2 * channels + head * d, k.dqkv.kind});
      if (dpad != nullptr) {
        add_padding(w, dkeys, d, scale, dpad + channels);
        add_padding(w, dvalues, d, T(1), dpad + 2 * channels);
      }
    }
  }
}

const vitzoo::WindowAttentionKernels kKernels = {bias_pass<float>,     bias_pass<double>,
                                                 forward_pass<float>,  forward_pass<double>,
                                                 backward_pass<float>, backward_pass<double>};

}  // namespace
