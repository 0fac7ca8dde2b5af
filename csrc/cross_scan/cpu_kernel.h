// Cross-scan and cross-merge for one instruction set. A plane is walked in square tiles of W rows and W
// columns that are transposed in registers; both orders and both directions of a tile are written (or read)
// while it is there, so that each pixel of the map is touched once, or twice where the last tiles overlap.
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::CrossScanArgs;

template <class V, int... I>
VITZOO_INLINE V mirrored(V v, Lanes<I...>) {
  constexpr int W = sizeof...(I);
  return __builtin_shufflevector(v, v, (W - 1 - I)...);
}

// Writes v[0] to p, v[1] to p - 1 and so on.
template <class T, class S>
VITZOO_INLINE void store_back(S* p, Vec<T> v, int count) {
  constexpr int W = Simd<T>::W;
  if (count == W) {
    store_row<T>(p - (W - 1), mirrored(v, typename MakeLanes<W>::type()), W);
    return;
  }
  T values[W];
  __builtin_memcpy(values, &v, sizeof(v));
  for (int i = 0; i < count; ++i) {
    narrow(values[i], p - i);
  }
}

// The opposite: base[at], base[at - 1] and so on; the other lanes are of no use.
template <class T, class S>
VITZOO_INLINE Vec<T> load_back(const S* base, int64_t at, int count) {
  constexpr int W = Simd<T>::W;
  const S* const p = base + at;
  if (at >= W - 1) {
    return mirrored(load_row<T>(p - (W - 1), W), typename MakeLanes<W>::type());
  }
  T values[W] = {};
  for (int i = 0; i < count; ++i) {
    values[i] = widen(p[-i]);
  }
  Vec<T> out;
  __builtin_memcpy(&out, values, sizeof(out));
  return out;
}

struct Plane {
  int64_t map, routes;  // offsets of the plane and of its first sequence
  int64_t step;         // between sequences
};

// Where a tile starts: the last one of a line of whole tiles overlaps the one before.
template <int W>
VITZOO_INLINE int64_t tile_start(int64_t i, int64_t size) {
  return size - i < W && size >= W ? size - W : i;
}

// Calls f(plane, row, rows, column, columns) for the tiles of planes [begin, end).
template <int W, class F>
VITZOO_INLINE void for_tiles(const CrossScanArgs& k, int64_t begin, int64_t end, const F& f) {
  const int64_t size = k.height * k.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / k.channels, channel = item % k.channels;
    const Plane plane{item * size, (batch * 4 * k.channels + channel) * size, k.channels * size};
    const int rows = k.height < W ? int(k.height) : W, columns = k.width < W ? int(k.width) : W;
    for (int64_t i = 0; i < k.height; i += W) {
      for (int64_t j = 0; j < k.width; j += W) {
        f(plane, tile_start<W>(i, k.height), rows, tile_start<W>(j, k.width), columns);
      }
    }
  }
}

template <class T, class S>
inline void scan_of(const CrossScanArgs& k, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::W;
  const int64_t last = k.height * k.width - 1;
  for_tiles<W>(k, begin, end,
               [&](const Plane& plane, int64_t i, int rows, int64_t j, int columns)
                   __attribute__((always_inline)) {
                     const S* const x = static_cast<const S*>(k.map) + plane.map;
                     S* const out = static_cast<S*>(k.routes) + plane.routes;
                     Vec<T> v[W];
                     for (int r = 0; r < W; ++r) {
                       v[r] = Vec<T>{};
                     }
                     for (int r = 0; r < rows; ++r) {
                       const int64_t place = (i + r) * k.width + j;
                       v[r] = load_row<T>(x + place, columns);
                       store_row<T>(out + place, v[r], columns);
                       store_back<T>(out + 2 * plane.step + last - place, v[r], columns);
                     }
                     transpose_step<T, 1>(v);
                     for (int c = 0; c < columns; ++c) {
                       const int64_t place = (j + c) * k.height + i;
                       store_row<T>(out + plane.step + place, v[c], rows);
                       store_back<T>(out + 3 * plane.step + last - place, v[c], rows);
                     }
                   });
}

template <class T, class S>
inline void merge_of(const CrossScanArgs& k, int64_t begin, int64_t end) {
  constexpr int W = Simd<T>::W;
  const int64_t last = k.height * k.width - 1;
  for_tiles<W>(k, begin, end,
               [&](const Plane& plane, int64_t i, int rows, int64_t j, int columns)
                   __attribute__((always_inline)) {
                     const S* const all = static_cast<const S*>(k.routes);
                     const S* const y = all + plane.routes;
                     const int64_t behind = plane.routes + last;
                     S* const out = static_cast<S*>(k.map) + plane.map;
                     Vec<T> v[W];
                     for (int c = 0; c < W; ++c) {
                       v[c] = Vec<T>{};
                     }
                     for (int c = 0; c < columns; ++c) {
                       const int64_t place = (j + c) * k.height + i;
                       v[c] = load_row<T>(y + plane.step + place, rows) +
                              load_back<T>(all, behind + 3 * plane.step - place, rows);
                     }
                     transpose_step<T, 1>(v);
                     for (int r = 0; r < rows; ++r) {
                       const int64_t place = (i + r) * k.width + j;
                       const Vec<T> along = load_row<T>(y + place, columns) +
                                            load_back<T>(all, behind + 2 * plane.step - place, columns);
                       store_row<T>(out + place, along + v[r], columns);
                     }
                   });
}

inline void scan(const CrossScanArgs& k, int64_t begin, int64_t end) {
  switch (k.kind) {
    case Kind::f64:
      return scan_of<double, double>(k, begin, end);
    case Kind::bf16:
      return scan_of<float, BFloat16>(k, begin, end);
    case Kind::f16:
      return scan_of<float, Float16>(k, begin, end);
    default:
      return scan_of<float, float>(k, begin, end);
  }
}

inline void merge(const CrossScanArgs& k, int64_t begin, int64_t end) {
  switch (k.kind) {
    case Kind::f64:
      return merge_of<double, double>(k, begin, end);
    case Kind::bf16:
      return merge_of<float, BFloat16>(k, begin, end);
    case Kind::f16:
      return merge_of<float, Float16>(k, begin, end);
    default:
      return merge_of<float, float>(k, begin, end);
  }
}

constexpr vitzoo::CrossScanKernels kKernels = {scan, merge};

}  // namespace
