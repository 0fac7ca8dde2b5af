// Norms of rows for one instruction set: a row is brought to the compute type once and stays in L1 for the
// passes over it.
#pragma once

#include "row_norm.h"
#include "simd_memory.h"

namespace {

using vitzoo::RowNormArgs;
using vitzoo::RowsOf;

template <class T, class S>
VITZOO_INLINE void widen_row(const S* p, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = widen(p[i]);
  }
}

template <class T, class S>
VITZOO_INLINE void narrow_row(const T* in, int64_t count, S* p) {
  for (int64_t i = 0; i < count; ++i) {
    narrow(in[i], p + i);
  }
}

template <class T>
inline void read_row(const RowsOf& x, int64_t row, int64_t count, T* out) {
  if constexpr (sizeof(T) == 8) {
    widen_row(static_cast<const T*>(x.data) + row * count, count, out);
  } else if (x.kind == Kind::bf16) {
    widen_row(static_cast<const BFloat16*>(x.data) + row * count, count, out);
  } else if (x.kind == Kind::f16) {
    widen_row(static_cast<const Float16*>(x.data) + row * count, count, out);
  } else {
    widen_row(static_cast<const T*>(x.data) + row * count, count, out);
  }
}

template <class T>
inline void write_row(const RowsOf& x, int64_t row, int64_t count, const T* in) {
  if constexpr (sizeof(T) == 8) {
    narrow_row(in, count, static_cast<T*>(x.data) + row * count);
  } else if (x.kind == Kind::bf16) {
    narrow_row(in, count, static_cast<BFloat16*>(x.data) + row * count);
  } else if (x.kind == Kind::f16) {
    narrow_row(in, count, static_cast<Float16*>(x.data) + row * count);
  } else {
    narrow_row(in, count, static_cast<T*>(x.data) + row * count);
  }
}

// Calls f(i, lanes) for the vectors of a row; the last may have fewer lanes.
template <class T, class F>
VITZOO_INLINE void for_vectors(int64_t count, const F& f) {
  constexpr int W = Simd<T>::W;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    f(i, W);
  }
  if (i < count) {
    f(i, int(count - i));
  }
}

template <class T>
VITZOO_INLINE T total(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < Simd<T>::W; ++i) {
    sum += v[i];
  }
  return sum;
}

template <class T>
VITZOO_INLINE Vec<T> optional_row(const void* p, int64_t i, int lanes) {
  return p == nullptr ? Vec<T>{} : load_row<T>(static_cast<const T*>(p) + i, lanes);
}

template <class T>
struct Moments {
  T mean, rstd;
};

template <class T>
VITZOO_INLINE Moments<T> moments_of(const RowNormArgs& k, const T* r) {
  Vec<T> sum{};
  T mean = 0;
  if (k.center) {
    for_vectors<T>(k.channels, [&](int64_t i, int lanes)
                                   __attribute__((always_inline)) { sum += load_row<T>(r + i, lanes); });
    mean = total<T>(sum) / T(k.channels);
    sum = Vec<T>{};
  }
  for_vectors<T>(k.channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec<T> v = load_row<T>(r + i, lanes) - mean;
    for (int j = lanes; j < Simd<T>::W; ++j) {
      v[j] = 0;
    }
    sum += v * v;
  });
  const T variance = total<T>(sum) / T(k.channels) + T(k.eps);
  return {mean, T(1) / T(__builtin_sqrt(double(variance)))};
}

// r of one row, and z of it.
template <class T>
VITZOO_INLINE void gather_row(const RowNormArgs& k, int64_t row, T* r, T* z) {
  read_row(k.x, row, k.channels, r);
  if (k.residual.data != nullptr) {
    read_row(k.residual, row, k.channels, z);
    for (int64_t i = 0; i < k.channels; ++i) {
      r[i] += z[i];
    }
  }
  if (k.z.data != nullptr) {
    read_row(k.z, row, k.channels, z);
    if (k.gate_first) {
      for_vectors<T>(k.channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec<T> gate = load_row<T>(z + i, lanes);
        store_row<T>(r + i, load_row<T>(r + i, lanes) * (gate * sigmoid<T>(gate)), lanes);
      });
    }
  }
}

template <class T>
void row_norm_forward(const RowNormArgs& k, int64_t begin, int64_t end, void* scratch) {
  const int64_t count = k.channels;
  T* const r = static_cast<T*>(scratch);
  T* const z = r + count;
  const T* const weight = static_cast<const T*>(k.weight);
  const bool gate_last = k.z.data != nullptr && !k.gate_first;
  for (int64_t row = begin; row < end; ++row) {
    gather_row<T>(k, row, r, z);
    if (k.r != nullptr) {
      __builtin_memcpy(static_cast<T*>(k.r) + row * count, r, sizeof(T) * size_t(count));
    }
    const Moments<T> m = moments_of<T>(k, r);
    for_vectors<T>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      Vec<T> n = (load_row<T>(r + i, lanes) - m.mean) * m.rstd * load_row<T>(weight + i, lanes) +
                 optional_row<T>(k.bias, i, lanes);
      if (gate_last) {
        const Vec<T> gate = load_row<T>(z + i, lanes);
        n *= gate * sigmoid<T>(gate);
      }
      store_row<T>(r + i, n, lanes);
    });
    write_row(k.out, row, count, r);
  }
}

template <class T>
VITZOO_INLINE Vec<T> silu_slope(Vec<T> z, Vec<T> s) {
  return s * (z * (T(1) - s) + T(1));
}

// One row: dx to `d`, dz to `z`, and the sums of the parameters' gradients go on.
template <class T>
VITZOO_INLINE void backward_row(const RowNormArgs& k, int64_t row, T* r, T* z, T* d, T* x, T* dweight,
                                T* dbias) {
  const int64_t count = k.channels;
  const bool gated = k.z.data != nullptr;
  const T* const weight = static_cast<const T*>(k.weight);
  if (k.r != nullptr) {
    __builtin_memcpy(r, static_cast<const T*>(k.r) + row * count, sizeof(T) * size_t(count));
  } else {
    gather_row<T>(k, row, r, z);
  }
  read_row(k.dout, row, count, d);
  const Moments<T> m = moments_of<T>(k, r);
  Vec<T> sum{}, product{};
  for_vectors<T>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec<T> hat = (load_row<T>(r + i, lanes) - m.mean) * m.rstd, dn = load_row<T>(d + i, lanes);
    const Vec<T> w = load_row<T>(weight + i, lanes);
    if (gated && !k.gate_first) {
      const Vec<T> gate = load_row<T>(z + i, lanes), s = sigmoid<T>(gate);
      store_row<T>(z + i, dn * hat * w * silu_slope<T>(gate, s), lanes);
      dn *= gate * s;
    }
    store_row<T>(dweight + i, load_row<T>(dweight + i, lanes) + dn * hat, lanes);
    if (dbias != nullptr) {
      store_row<T>(dbias + i, load_row<T>(dbias + i, lanes) + dn, lanes);
    }
    dn *= w;  // zero in unused lanes, as w is
    store_row<T>(d + i, dn, lanes);
    store_row<T>(r + i, hat, lanes);
    sum += dn;
    product += dn * hat;
  });
  const T mean_sum = k.center ? total<T>(sum) / T(count) : T(0), mean_product = total<T>(product) / T(count);
  const T* const dr = k.dr == nullptr ? nullptr : static_cast<const T*>(k.dr) + row * count;
  if (gated && k.gate_first) {
    read_row(k.x, row, count, x);
  }
  for_vectors<T>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec<T> g = (load_row<T>(d + i, lanes) - mean_sum - load_row<T>(r + i, lanes) * mean_product) * m.rstd +
               optional_row<T>(dr, i, lanes);
    if (gated && k.gate_first) {
      const Vec<T> gate = load_row<T>(z + i, lanes), s = sigmoid<T>(gate);
      store_row<T>(z + i, g * load_row<T>(x + i, lanes) * silu_slope<T>(gate, s), lanes);
      g *= gate * s;
    }
    store_row<T>(d + i, g, lanes);
  });
}

template <class T>
void row_norm_backward(const RowNormArgs& k, int64_t begin, int64_t end, void* scratch) {
  const int64_t count = k.channels;
  T* const r = static_cast<T*>(scratch);
  T *const z = r + count, *const d = z + count, *const x = d + count;
  for (int64_t part = begin; part < end; ++part) {
    T* const dweight = static_cast<T*>(k.dweight) + part * count;
    T* const dbias = k.dbias == nullptr ? nullptr : static_cast<T*>(k.dbias) + part * count;
    for (int64_t i = 0; i < count; ++i) {
      dweight[i] = 0;
      if (dbias != nullptr) {
        dbias[i] = 0;
      }
    }
    const int64_t stop = (part + 1) * k.part_rows < k.rows ? (part + 1) * k.part_rows : k.rows;
    for (int64_t row = part * k.part_rows; row < stop; ++row) {
      backward_row<T>(k, row, r, z, d, x, dweight, dbias);
      write_row(k.dx, row, count, d);
      if (k.dresidual.data != nullptr) {
        write_row(k.dresidual, row, count, d);
      }
      if (k.dz.data != nullptr) {
        write_row(k.dz, row, count, z);
      }
    }
  }
}

constexpr vitzoo::RowNormKernels kRowNormKernels = {row_norm_forward<float>, row_norm_forward<double>,
                                                    row_norm_backward<float>, row_norm_backward<double>};

}  // namespace
