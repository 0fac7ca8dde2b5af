// What the attention kernels share: small matrix products on packed operands, and softmax over the keys with
// one query a lane. Scores stand transposed, (keys, queries), so that the maximum, the sum and the rescaling
// of the online softmax are plain vector operations. Include after simd.h's headers, inside an isa_*.h pair.
//
// Legend: n keys, lanes = queries rounded up to vectors, d head_dim, dp = d rounded up to vectors.
#pragma once

#include "simd_memory.h"

namespace {

template <class T>
VITZOO_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
VITZOO_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
inline void zero(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    p[i] = T(0);
  }
}

template <class T>
constexpr int64_t round_up(int64_t x) {
  return (x + Simd<T>::W - 1) / Simd<T>::W * Simd<T>::W;
}

// Products
// ---------------------------------------------------------------------------------------------------

// c(i, :) = init(i, :) + sum_t a[i * row + t * step] b(t, :) for a number of rows; vectors of b are kept in
// registers and elements of a broadcast. init may be null (zeros) or c itself.
template <class T>
struct Product {
  const T* a;
  int64_t row, step;
  const T* b;
  int64_t ldb, depth;
  const T* init;
  int64_t ldi;
  T* c;
  int64_t ldc;
};

template <class T, int MR, int NV>
VITZOO_INLINE void product_tile(const Product<T>& p, int64_t i0, int64_t j0) {
  constexpr int W = Simd<T>::W;
  Vec<T> sum[MR][NV];
  const T* a[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    a[i] = p.a + (i0 + i) * p.row;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      sum[i][j] = p.init == nullptr ? Vec<T>{} : load<T>(p.init + (i0 + i) * p.ldi + j0 + j * W);
    }
  }
  const T* b = p.b + j0;
  for (int64_t t = 0; t < p.depth; ++t, b += p.ldb) {
    Vec<T> v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      v[j] = load<T>(b + j * W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec<T> x = broadcast<T>(a[i][t * p.step]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        sum[i][j] += x * v[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      store<T>(p.c + (i0 + i) * p.ldc + j0 + j * W, sum[i][j]);
    }
  }
}

template <class T, int MR, int NV>
inline void product_rows(const Product<T>& p, int64_t i, int64_t rows, int64_t j) {
  for (; i + MR <= rows; i += MR) {
    product_tile<T, MR, NV>(p, i, j);
  }
  if constexpr (MR > 1) {
    if (i < rows) {
      product_rows<T, MR / 2, NV>(p, i, rows, j);
    }
  }
}

// Sums that fit the registers: 32 with AVX-512, 16 otherwise, less one vector of b each and one element of a.
constexpr bool kManyRegisters = VITZOO_VECTOR_BYTES == 64;
constexpr int kRows4 = kManyRegisters ? 6 : 2, kRows3 = kManyRegisters ? 8 : 4,
              kRows2 = kManyRegisters ? 12 : 6, kRows1 = kManyRegisters ? 16 : 8;

template <class T>
inline void multiply(const Product<T>& p, int64_t rows, int64_t columns) {
  constexpr int W = Simd<T>::W;
  int64_t j = 0;
  while (j < columns) {
    const int64_t left = (columns - j) / W;
    if (kManyRegisters && left >= 4 && left != 5) {
      product_rows<T, kRows4, 4>(p, 0, rows, j);
      j += 4 * W;
    } else if (left == 3 || left >= 5) {
      product_rows<T, kRows3, 3>(p, 0, rows, j);
      j += 3 * W;
    } else if (left >= 2) {
      product_rows<T, kRows2, 2>(p, 0, rows, j);
      j += 2 * W;
    } else {
      product_rows<T, kRows1, 1>(p, 0, rows, j);
      j += W;
    }
  }
}

// Packing
// ----------------------------------------------------------------------------------------------------

// Rows of a strided tensor: their addresses, null for a row of zeros, and an offset in elements that is the
// same for all.
struct RowsIn {
  const void* const* row;
  int64_t offset;
  Kind kind;
};
struct RowsOut {
  void* const* row;  // null: not stored
  int64_t offset;
  Kind kind;
};

template <class T, class S>
inline void pack_rows_of(const RowsIn& in, int64_t count, int64_t d, T* out) {
  constexpr int W = Simd<T>::W;
  const int64_t dp = round_up<T>(d);
  for (int64_t i = 0; i < count; ++i, out += dp) {
    if (in.row[i] == nullptr) {
      for (int64_t c = 0; c < dp; c += W) {
        store<T>(out + c, Vec<T>{});
      }
      continue;
    }
    const S* const p = static_cast<const S*>(in.row[i]) + in.offset;
    for (int64_t c = 0; c < dp; c += W) {
      store<T>(out + c, load_row<T>(p + c, d - c < W ? int(d - c) : W));
    }
  }
}

// Whether W rows from q on are all there: a tile of theirs then needs no care, as most do not.
template <int W>
VITZOO_INLINE bool all_there(const void* const* row, int64_t q, int64_t count) {
  bool there = q + W <= count;
  for (int r = 0; there && r < W; ++r) {
    there = row[q + r] != nullptr;
  }
  return there;
}

// (count, d) to (d, lanes), times a factor; lanes past count are zero.
template <class T, class S>
inline void pack_columns_of(const RowsIn& in, int64_t count, int64_t d, T factor, T* out, int64_t lanes) {
  constexpr int W = Simd<T>::W;
  for (int64_t q = 0; q < lanes; q += W) {
    int64_t c = 0;
    if (all_there<W>(in.row, q, count)) {
      for (; c + W <= d; c += W) {
        Vec<T> v[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          v[r] = load_row<T>(static_cast<const S*>(in.row[q + r]) + in.offset + c, W) * factor;
        }
        transpose_step<T, 1>(v);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          store<T>(out + (c + r) * lanes + q, v[r]);
        }
      }
    }
    for (; c < d; c += W) {
      const int columns = d - c < W ? int(d - c) : W;
      Vec<T> v[W];
      for (int r = 0; r < W; ++r) {
        const void* const row = q + r < count ? in.row[q + r] : nullptr;
        v[r] = row == nullptr ? Vec<T>{}
                              : load_row<T>(static_cast<const S*>(row) + in.offset + c, columns) * factor;
      }
      transpose_step<T, 1>(v);
      for (int r = 0; r < columns; ++r) {
        store<T>(out + (c + r) * lanes + q, v[r]);
      }
    }
  }
}

template <class T, class S>
inline void unpack_rows_of(const T* in, int64_t count, int64_t d, T factor, const RowsOut& out) {
  constexpr int W = Simd<T>::W;
  const int64_t dp = round_up<T>(d);
  for (int64_t i = 0; i < count; ++i, in += dp) {
    if (out.row[i] != nullptr) {
      S* const p = static_cast<S*>(out.row[i]) + out.offset;
      for (int64_t c = 0; c < d; c += W) {
        store_row<T>(p + c, load<T>(in + c) * factor, d - c < W ? int(d - c) : W);
      }
    }
  }
}

// (d, lanes) to (count, d), each lane times its own factor.
template <class T, class S>
inline void unpack_columns_of(const T* in, int64_t lanes, int64_t count, int64_t d, const T* factor,
                              const RowsOut& out) {
  constexpr int W = Simd<T>::W;
  for (int64_t q = 0; q < count; q += W) {
    const Vec<T> f = load<T>(factor + q);
    for (int64_t c = 0; c < d; c += W) {
      const int columns = d - c < W ? int(d - c) : W;
      Vec<T> v[W];
      for (int r = 0; r < W; ++r) {
        v[r] = load<T>(in + (c + (r < columns ? r : 0)) * lanes + q) * f;
      }
      transpose_step<T, 1>(v);
      for (int r = 0; r < W && q + r < count; ++r) {
        if (out.row[q + r] != nullptr) {
          store_row<T>(static_cast<S*>(out.row[q + r]) + out.offset + c, v[r], columns);
        }
      }
    }
  }
}

// Calls f with a null pointer of the element type.
template <class T, class F>
VITZOO_INLINE void with_element(Kind kind, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (kind == Kind::bf16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (kind == Kind::f16) {
    f(static_cast<Float16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}
template <class S>
S element_of(S*);

template <class T>
inline void pack_rows(const RowsIn& in, int64_t count, int64_t d, T* out) {
  with_element<T>(in.kind, [&](auto* s) { pack_rows_of<T, decltype(element_of(s))>(in, count, d, out); });
}
template <class T>
inline void pack_columns(const RowsIn& in, int64_t count, int64_t d, T factor, T* out, int64_t lanes) {
  with_element<T>(in.kind, [&](auto* s) {
    pack_columns_of<T, decltype(element_of(s))>(in, count, d, factor, out, lanes);
  });
}
template <class T>
inline void unpack_rows(const T* in, int64_t count, int64_t d, T factor, const RowsOut& out) {
  with_element<T>(out.kind,
                  [&](auto* s) { unpack_rows_of<T, decltype(element_of(s))>(in, count, d, factor, out); });
}
template <class T>
inline void unpack_columns(const T* in, int64_t lanes, int64_t count, int64_t d, const T* factor,
                           const RowsOut& out) {
  with_element<T>(out.kind, [&](auto* s) {
    unpack_columns_of<T, decltype(element_of(s))>(in, lanes, count, d, factor, out);
  });
}

// Softmax
// ----------------------------------------------------------------------------------------------------

template <class T>
constexpr T kInfinity = T(__builtin_inff());

// Where the maximum starts: finite, so that keys that are all excluded so far do not give inf - inf.
template <class T>
constexpr T kLowest = T(-3e38f);

// 1 / total; NaN, as softmax has it, for a query whose scores are all -inf.
template <class T>
VITZOO_INLINE Vec<T> inverse_total(Vec<T> total, Vec<T> largest) {
  return largest > kLowest<T> ? T(1) / total : broadcast<T>(T(__builtin_nanf("")));
}

// 2^x for x <= 0, at least the smallest normal number.
template <class T>
VITZOO_INLINE Vec<T> exp2_nonpositive(Vec<T> x) {
  const Vec<T> z = at_least<T>(x, Simd<T>::min_exponent);
  const Vec<T> shifted = z + Simd<T>::magic;
  return scale_by_power<T>(exp2_fraction(z - (shifted - Simd<T>::magic)), shifted);
}

// Excludes keys of another region than the query's: scores (n, lanes), region numbers as T.
template <class T>
inline void mask_regions(T* s, int64_t n, int64_t lanes, const T* key_region, const T* query_region) {
  constexpr int W = Simd<T>::W;
  for (int64_t k = 0; k < n; ++k, s += lanes) {
    for (int64_t j = 0; j < lanes; j += W) {
      const auto same = load<T>(query_region + j) == broadcast<T>(key_region[k]);
      store<T>(s + j, same ? load<T>(s + j) : broadcast<T>(-kInfinity<T>));
    }
  }
}

// Takes scores in units of log 2, (n, lanes), to 2^(s - largest), where `largest` (lanes) is that of all keys
// so far, and adds them to `total` (lanes). Where there were keys before, `o` (d, lanes) is rescaled.
template <class T, int NV>
inline void softmax_vectors(T* s, int64_t n, int64_t lanes, T* largest, T* total, T* o, int64_t d,
                            bool first) {
  constexpr int W = Simd<T>::W;
  Vec<T> best[NV], sum[NV];
  for (int j = 0; j < NV; ++j) {
    best[j] = first ? broadcast<T>(kLowest<T>) : load<T>(largest + j * W);
    sum[j] = Vec<T>{};
  }
  for (int64_t k = 0; k < n; ++k) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      best[j] = larger(best[j], load<T>(s + k * lanes + j * W));
    }
  }
  for (int64_t k = 0; k < n; ++k) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const Vec<T> p = exp2_nonpositive<T>(load<T>(s + k * lanes + j * W) - best[j]);
      store<T>(s + k * lanes + j * W, p);
      sum[j] += p;
    }
  }
  for (int j = 0; j < NV; ++j) {
    if (!first) {
      const Vec<T> shrink = exp2_nonpositive<T>(load<T>(largest + j * W) - best[j]);
      sum[j] += load<T>(total + j * W) * shrink;
      for (int64_t c = 0; c < d; ++c) {
        store<T>(o + c * lanes + j * W, load<T>(o + c * lanes + j * W) * shrink);
      }
    }
    store<T>(largest + j * W, best[j]);
    store<T>(total + j * W, sum[j]);
  }
}

template <class T>
inline void softmax_keys(T* s, int64_t n, int64_t lanes, T* largest, T* total, T* o, int64_t d, bool first) {
  constexpr int W = Simd<T>::W;
  int64_t j = 0;
  for (; j + 2 * W <= lanes; j += 2 * W) {
    softmax_vectors<T, 2>(s + j, n, lanes, largest + j, total + j, o + j, d, first);
  }
  if (j < lanes) {
    softmax_vectors<T, 1>(s + j, n, lanes, largest + j, total + j, o + j, d, first);
  }
}

// Attention of one block of queries
// --------------------------------------------------------------------------

constexpr int64_t kQueries = 64;  // a block of queries has at most this many
constexpr int64_t kKeys = 96;     // keys whose scores the forward pass keeps at once

// Hands out scratch memory in vectors.
template <class T>
struct Arena {
  T* next;
  T* take(int64_t count) {
    T* const p = next;
    next += (count + 15) / 16 * 16;  // whole lines of the widest vectors
    return p;
  }
};

// What a block of queries has beside q, k and v.
template <class T>
struct Extras {
  const T* bias = nullptr;  // (n, ldb) in units of log 2, a column a query, or null
  int64_t ldb = 0;
  const T* key_region = nullptr;  // (n), or null: nothing is masked
  const T* query_region = nullptr;
  T* first_row = nullptr;  // (n): the weights of query 0, or null
};

template <class T>
struct ForwardScratch {
  T *qt, *s, *ot, *largest, *total;
  ForwardScratch(Arena<T>& arena, int64_t d) {
    qt = arena.take(d * kQueries);
    ot = arena.take(d * kQueries);
    s = arena.take(kKeys * kQueries);
    largest = arena.take(kQueries);
    total = arena.take(kQueries);
  }
};

// out = softmax(scale q k^T + bias) v for `count` <= kQueries queries; k and v are packed rows (n, dp).
template <class T>
inline void attend(const ForwardScratch<T>& w, const RowsIn& q, int64_t count, const T* k, const T* v,
                   int64_t n, int64_t d, T scale, const Extras<T>& extras, const RowsOut& out) {
  constexpr int W = Simd<T>::W;
  const int64_t lanes = round_up<T>(count), dp = round_up<T>(d);
  pack_columns<T>(q, count, d, scale * T(kLog2e), w.qt, lanes);
  const int64_t pieces = (n + kKeys - 1) / kKeys, piece = (n + pieces - 1) / pieces;
  for (int64_t k0 = 0; k0 < n; k0 += piece) {
    const int64_t keys = n - k0 < piece ? n - k0 : piece;
    const T* const bias = extras.bias == nullptr ? nullptr : extras.bias + k0 * extras.ldb;
    multiply<T>({k + k0 * dp, dp, 1, w.qt, lanes, d, bias, extras.ldb, w.s, lanes}, keys, lanes);
    if (extras.key_region != nullptr) {
      mask_regions<T>(w.s, keys, lanes, extras.key_region + k0, extras.query_region);
    }
    if (extras.first_row != nullptr) {
      for (int64_t i = 0; i < keys; ++i) {
        extras.first_row[k0 + i] = w.s[i * lanes];
      }
    }
    softmax_keys<T>(w.s, keys, lanes, w.largest, w.total, w.ot, d, k0 == 0);
    multiply<T>({v + k0 * dp, 1, dp, w.s, lanes, keys, k0 == 0 ? nullptr : w.ot, lanes, w.ot, lanes}, d,
                lanes);
  }
  for (int64_t j = 0; j < lanes; j += W) {
    store<T>(w.total + j, inverse_total<T>(load<T>(w.total + j), load<T>(w.largest + j)));
  }
  if (extras.first_row != nullptr) {
    for (int64_t i = 0; i < n; i += W) {
      const int width = n - i < W ? int(n - i) : W;
      const Vec<T> p = exp2_nonpositive<T>(load_row<T>(extras.first_row + i, width) - w.largest[0]);
      store_row<T>(extras.first_row + i, p * w.total[0], width);
    }
  }
  unpack_columns<T>(w.ot, lanes, count, d, w.total, out);
}

template <class T>
struct BackwardScratch {
  T *qt, *dot, *q, *dout, *p, *ds, *largest, *total;
  BackwardScratch(Arena<T>& arena, int64_t n, int64_t d) {
    const int64_t dp = round_up<T>(d);
    qt = arena.take(d * kQueries);
    dot = arena.take(d * kQueries);
    q = arena.take(dp * kQueries);
    dout = arena.take(dp * kQueries);
    p = arena.take(n * kQueries);
    ds = arena.take(n * kQueries);
    largest = arena.take(kQueries);
    total = arena.take(kQueries);
  }
};

// What a block of queries gives beside dq.
template <class T>
struct Gradients {
  T* dk;                          // (n, dp), added to; still to be multiplied by the scale
  T* dv;                          // (n, dp), added to
  T* dbias = nullptr;             // (n, ldb), added to, or null
  const T* dfirst_row = nullptr;  // (n), or null: gradient of the weights of query 0
};

// s (n, lanes) to p = 2^(s - largest) / total, in place.
template <class T>
inline void normalise(const BackwardScratch<T>& w, int64_t n, int64_t lanes) {
  constexpr int W = Simd<T>::W;
  softmax_keys<T>(w.p, n, lanes, w.largest, w.total, nullptr, 0, true);
  for (int64_t j = 0; j < lanes; j += W) {
    const Vec<T> inverse = inverse_total<T>(load<T>(w.total + j), load<T>(w.largest + j));
    for (int64_t k = 0; k < n; ++k) {
      store<T>(w.p + k * lanes + j, load<T>(w.p + k * lanes + j) * inverse);
    }
  }
}

// dp (n, lanes) to ds = p (dp - sum over keys of p dp), in place.
template <class T>
inline void softmax_backward(const BackwardScratch<T>& w, int64_t n, int64_t lanes) {
  constexpr int W = Simd<T>::W;
  for (int64_t j = 0; j < lanes; j += W) {
    Vec<T> even{}, odd{};
    int64_t k = 0;
    for (; k + 1 < n; k += 2) {
      even += load<T>(w.p + k * lanes + j) * load<T>(w.ds + k * lanes + j);
      odd += load<T>(w.p + (k + 1) * lanes + j) * load<T>(w.ds + (k + 1) * lanes + j);
    }
    if (k < n) {
      even += load<T>(w.p + k * lanes + j) * load<T>(w.ds + k * lanes + j);
    }
    const Vec<T> mean = even + odd;
    for (k = 0; k < n; ++k) {
      T* const ds = w.ds + k * lanes + j;
      store<T>(ds, load<T>(w.p + k * lanes + j) * (load<T>(ds) - mean));
    }
  }
}

// Gradients of `attend`; dq is stored, the others are added to.
template <class T>
inline void attend_backward(const BackwardScratch<T>& w, const RowsIn& q, const RowsIn& dout, int64_t count,
                            const T* k, const T* v, int64_t n, int64_t d, T scale, const Extras<T>& extras,
                            const Gradients<T>& gradients, const RowsOut& dq) {
  constexpr int W = Simd<T>::W;
  const int64_t lanes = round_up<T>(count), dp = round_up<T>(d);
  pack_columns<T>(q, count, d, scale * T(kLog2e), w.qt, lanes);
  pack_columns<T>(dout, count, d, T(1), w.dot, lanes);
  pack_rows<T>(q, count, d, w.q);
  pack_rows<T>(dout, count, d, w.dout);
  multiply<T>({k, dp, 1, w.qt, lanes, d, extras.bias, extras.ldb, w.p, lanes}, n, lanes);
  if (extras.key_region != nullptr) {
    mask_regions<T>(w.p, n, lanes, extras.key_region, extras.query_region);
  }
  normalise<T>(w, n, lanes);
  multiply<T>({v, dp, 1, w.dot, lanes, d, nullptr, 0, w.ds, lanes}, n, lanes);
  if (gradients.dfirst_row != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      w.ds[i * lanes] += gradients.dfirst_row[i];
    }
  }
  softmax_backward<T>(w, n, lanes);
  multiply<T>({w.p, lanes, 1, w.dout, dp, count, gradients.dv, dp, gradients.dv, dp}, n, dp);
  multiply<T>({w.ds, lanes, 1, w.q, dp, count, gradients.dk, dp, gradients.dk, dp}, n, dp);
  if (gradients.dbias != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < lanes; j += W) {
        T* const sum = gradients.dbias + i * extras.ldb + j;
        store<T>(sum, load<T>(sum) + load<T>(w.ds + i * lanes + j));
      }
    }
  }
  // qt is free by now
  multiply<T>({k, 1, dp, w.ds, lanes, n, nullptr, 0, w.qt, lanes}, d, lanes);
  for (int64_t j = 0; j < lanes; j += W) {
    store<T>(w.total + j, broadcast<T>(scale));
  }
  unpack_columns<T>(w.qt, lanes, count, d, w.total, dq);
}

}  // namespace
