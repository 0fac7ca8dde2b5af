// Vectors to and from memory of any element type: rows, transposes, and tiles of channels by tokens. Include
// like simd.h, which comes along.
#pragma once

#include "simd.h"

namespace {

// Elements in memory
// -------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
VITZOO_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  __builtin_memcpy(&out, &x, sizeof(To));
  return out;
}

VITZOO_INLINE float widen(float x) { return x; }
VITZOO_INLINE double widen(double x) { return x; }
VITZOO_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
VITZOO_INLINE float widen(Float16 x) {
  // The exponent is rebased by a multiplication, which also normalises subnormal numbers.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(0x77800000));
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (uint32_t(x.bits & 0x8000) << 16));
}

VITZOO_INLINE void narrow(float x, float* out) { *out = x; }
VITZOO_INLINE void narrow(double x, double* out) { *out = x; }
VITZOO_INLINE void narrow(float x, BFloat16* out) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
VITZOO_INLINE void narrow(float x, Float16* out) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 aligns the last bit of the result with the last bit of the sum
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = uint16_t(sign | half);
}

template <class T, class S>
constexpr bool kSameType = false;
template <class T>
constexpr bool kSameType<T, T> = true;

#if defined(__x86_64__) && VITZOO_VECTOR_BYTES == 32
VITZOO_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// `count` of W elements; the other lanes are zero.
template <class T, class S>
VITZOO_INLINE Vec<T> load_row(const S* p, int count) {
  constexpr int W = Simd<T>::W;
  Vec<T> out;
  if (count == W) {
    if constexpr (kSameType<T, S>) {
      __builtin_memcpy(&out, p, sizeof(out));
    } else {
      for (int i = 0; i < W; ++i) {
        out[i] = widen(p[i]);
      }
    }
    return out;
  }
#ifdef VITZOO_EXP_TABLE
  if constexpr (kSameType<T, S> && sizeof(T) == 4) {
#if VITZOO_VECTOR_BYTES == 64
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#else
    return (Vec<T>)_mm256_maskload_ps(p, first_lanes(count));
#endif
  }
#endif
  T values[W] = {};
  for (int i = 0; i < count; ++i) {
    values[i] = widen(p[i]);
  }
  __builtin_memcpy(&out, values, sizeof(out));
  return out;
}

template <class T, class S>
VITZOO_INLINE void store_row(S* p, Vec<T> v, int count) {
  constexpr int W = Simd<T>::W;
  if constexpr (kSameType<T, S>) {
    if (count == W) {
      __builtin_memcpy(p, &v, sizeof(v));
      return;
    }
#ifdef VITZOO_EXP_TABLE
    if constexpr (sizeof(T) == 4) {
#if VITZOO_VECTOR_BYTES == 64
      _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#else
      _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#endif
      return;
    }
#endif
  }
  T values[W];
  __builtin_memcpy(values, &v, sizeof(v));
  for (int i = 0; i < count; ++i) {
    narrow(values[i], p + i);
  }
}

// Transposes
// ---------------------------------------------------------------------------------------------------------

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};

// Lanes whose number has bit K come from b resp. stay, the others stay resp. come from a: one step of a
// transpose.
template <int K, class V, int... I>
VITZOO_INLINE V merge_low(V a, V b, Lanes<I...>) {
  constexpr int W = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & K) ? W + I - K : I)...);
}
template <int K, class V, int... I>
VITZOO_INLINE V merge_high(V a, V b, Lanes<I...>) {
  constexpr int W = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & K) ? W + I : I + K)...);
}

template <class T, int K>
VITZOO_INLINE void transpose_step(Vec<T>* v) {
  constexpr int W = Simd<T>::W;
  if constexpr (K < W) {
    const typename MakeLanes<W>::type lanes;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (!(i & K)) {
        const Vec<T> a = v[i], b = v[i | K];
        v[i] = merge_low<K>(a, b, lanes);
        v[i | K] = merge_high<K>(a, b, lanes);
      }
    }
    transpose_step<T, 2 * K>(v);
  }
}

// Lane i of the result is the sum of the lanes of v[i]; v is overwritten.
template <class T, int K>
VITZOO_INLINE Vec<T> sum_lanes(Vec<T>* v) {
  constexpr int W = Simd<T>::W;
  if constexpr (K < W) {
    const typename MakeLanes<W>::type lanes;
#pragma GCC unroll 8
    for (int i = 0; i < W / (2 * K); ++i) {
      const Vec<T> a = v[2 * i], b = v[2 * i + 1];
      v[i] = merge_low<K>(a, b, lanes) + merge_high<K>(a, b, lanes);
    }
    return sum_lanes<T, 2 * K>(v);
  } else {
    return v[0];
  }
}

// Tiles: W channels in the lanes, one vector a token
// -----------------------------------------------------------------

template <class T, class S>
inline void load_tile_of(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                         int64_t count, Vec<T>* out) {
  constexpr int W = Simd<T>::W;
  const S* const p =
      static_cast<const S*>(view.data) + batch * view.batch + channel * view.channel + token * view.token;
  if (view.token == 1) {
    for (int64_t t = 0; t < count; t += W) {
      const int columns = count - t < W ? int(count - t) : W;
      Vec<T> v[W];
      for (int r = 0; r < W; ++r) {
        v[r] = load_row<T>(p + (r < width ? r : 0) * view.channel + t, columns);
      }
      for (int r = width; r < W; ++r) {
        v[r] = Vec<T>{};
      }
      transpose_step<T, 1>(v);
      for (int r = 0; r < columns; ++r) {
        out[t + r] = v[r];
      }
    }
  } else if (view.channel == 1) {
    for (int64_t t = 0; t < count; ++t) {
      out[t] = load_row<T>(p + t * view.token, width);
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      T values[W] = {};
      for (int r = 0; r < width; ++r) {
        values[r] = widen(p[r * view.channel + t * view.token]);
      }
      __builtin_memcpy(&out[t], values, sizeof(out[t]));
    }
  }
}

template <class T, class S>
inline void store_tile_of(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                          int64_t count,
                          const Vec<T>* in) {  // view.token must be 1
  constexpr int W = Simd<T>::W;
  S* const p = static_cast<S*>(view.data) + batch * view.batch + channel * view.channel + token;
  for (int64_t t = 0; t < count; t += W) {
    const int columns = count - t < W ? int(count - t) : W;
    Vec<T> v[W];
    for (int r = 0; r < W; ++r) {
      v[r] = in[t + (r < columns ? r : 0)];
    }
    transpose_step<T, 1>(v);
    for (int r = 0; r < width; ++r) {
      store_row<T>(p + r * view.channel + t, v[r], columns);
    }
  }
}

// Asks for the cache lines of share `part` of `parts` of a tile that is needed soon: the rows are too short
// for the hardware to guess, and all at once they would be too many to be on their way. To L2: L1 has no
// room.
template <int ForWriting>
VITZOO_INLINE void prefetch_tile(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                                 int64_t count, int64_t part, int64_t parts) {
  if (view.data == nullptr) {
    return;
  }
  const int64_t size = view.kind == Kind::f64 ? 8 : view.kind == Kind::f32 ? 4 : 2;
  const char* const p = static_cast<const char*>(view.data) +
                        size * (batch * view.batch + channel * view.channel + token * view.token);
  const bool rows = view.token == 1;  // else a token is a row, contiguous at best
  const int64_t lines = rows ? width : count, step = size * (rows ? view.channel : view.token);
  const int64_t bytes = size * (rows ? count : width);
  for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    const char* const row = p + line * step;
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(row + byte, ForWriting, 2);
    }
    __builtin_prefetch(row + bytes - 1, ForWriting, 2);
  }
}

inline void load_tile(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                      int64_t count, Vec<double>* out) {
  load_tile_of<double, double>(view, batch, channel, width, token, count, out);
}

inline void load_tile(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                      int64_t count, Vec<float>* out) {
  switch (view.kind) {
    case Kind::bf16:
      return load_tile_of<float, BFloat16>(view, batch, channel, width, token, count, out);
    case Kind::f16:
      return load_tile_of<float, Float16>(view, batch, channel, width, token, count, out);
    default:
      return load_tile_of<float, float>(view, batch, channel, width, token, count, out);
  }
}

inline void store_tile(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                       int64_t count, const Vec<double>* in) {
  store_tile_of<double, double>(view, batch, channel, width, token, count, in);
}

inline void store_tile(const View& view, int64_t batch, int64_t channel, int width, int64_t token,
                       int64_t count, const Vec<float>* in) {
  switch (view.kind) {
    case Kind::bf16:
      return store_tile_of<float, BFloat16>(view, batch, channel, width, token, count, in);
    case Kind::f16:
      return store_tile_of<float, Float16>(view, batch, channel, width, token, count, in);
    default:
      return store_tile_of<float, float>(view, batch, channel, width, token, count, in);
  }
}

}  // namespace
