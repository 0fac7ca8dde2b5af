// Tiles of a chunk for one instruction set: where they lie, loading, storing, transposing and scaling their
// rows.
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

}  // namespace
