// Vectors of one instruction set's width, and the elementary functions the kernels need, as plain C++ over
// compiler vector types. Include after an isa_*.h header (or after none, for the baseline). Everything has
// internal linkage, so that each translation unit keeps its own copy.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

#ifndef VITZOO_VECTOR_BYTES
#define VITZOO_VECTOR_BYTES 16
#endif
#define VITZOO_INLINE inline __attribute__((always_inline))

namespace {

using vitzoo::Kind;
using vitzoo::View;

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  static constexpr int W = VITZOO_VECTOR_BYTES / 4;
  static constexpr int mantissa = 23;
  static constexpr float magic =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float min_exponent = -126.0f, max_exponent = 128.0f;
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  static constexpr int W = VITZOO_VECTOR_BYTES / 8;
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double min_exponent = -1022.0, max_exponent = 1024.0;
  static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
};

template <class T>
using Vec = typename Simd<T>::V;

constexpr double kLog2e = 1.4426950408889634074;

template <class T>
VITZOO_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// max(low, x) and min(high, x); a NaN in x comes out. x86 has these very instructions, but GCC makes a
// comparison and a blend of the portable form, which cost the scan a tenth of its speed.
#if defined(__x86_64__)
#if VITZOO_VECTOR_BYTES == 64
#define VITZOO_X86(name) _mm512_##name
#define VITZOO_X86_TYPE(suffix) __m512##suffix
#elif VITZOO_VECTOR_BYTES == 32
#define VITZOO_X86(name) _mm256_##name
#define VITZOO_X86_TYPE(suffix) __m256##suffix
#else
#define VITZOO_X86(name) _mm_##name
#define VITZOO_X86_TYPE(suffix) __m128##suffix
#endif
VITZOO_INLINE Vec<float> larger(Vec<float> low, Vec<float> x) {
  return (Vec<float>)VITZOO_X86(max_ps)((VITZOO_X86_TYPE())low, (VITZOO_X86_TYPE())x);
}
VITZOO_INLINE Vec<double> larger(Vec<double> low, Vec<double> x) {
  return (Vec<double>)VITZOO_X86(max_pd)((VITZOO_X86_TYPE(d))low, (VITZOO_X86_TYPE(d))x);
}
VITZOO_INLINE Vec<float> smaller(Vec<float> high, Vec<float> x) {
  return (Vec<float>)VITZOO_X86(min_ps)((VITZOO_X86_TYPE())high, (VITZOO_X86_TYPE())x);
}
VITZOO_INLINE Vec<double> smaller(Vec<double> high, Vec<double> x) {
  return (Vec<double>)VITZOO_X86(min_pd)((VITZOO_X86_TYPE(d))high, (VITZOO_X86_TYPE(d))x);
}
#else
template <class V>
VITZOO_INLINE V larger(V low, V x) {
  return low > x ? low : x;
}
template <class V>
VITZOO_INLINE V smaller(V high, V x) {
  return high < x ? high : x;
}
#endif

template <class T>
VITZOO_INLINE Vec<T> at_least(Vec<T> x, T low) {
  return larger(broadcast<T>(low), x);
}

template <class T>
VITZOO_INLINE Vec<T> at_most(Vec<T> x, T high) {
  return smaller(broadcast<T>(high), x);
}

// 2^f on [-1/2, 1/2]: minimax with p(0) = 1, relative error 2e-9; for double the Taylor series to degree 13,
// 4e-18.
VITZOO_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = f * 1.53533620e-4f + 1.33988739e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  return p * f + 1.0f;
}

VITZOO_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  Vec<double> p = f * 1.3691488853904129e-12 + 2.5678435993488202e-11;
  p = p * f + 4.4455382718708116e-10;
  p = p * f + 7.0549116208011234e-9;
  p = p * f + 1.0178086009239699e-7;
  p = p * f + 1.3215486790144309e-6;
  p = p * f + 1.5252733804059841e-5;
  p = p * f + 1.5403530393381610e-4;
  p = p * f + 1.3333558146428443e-3;
  p = p * f + 9.6181291076284771e-3;
  p = p * f + 5.5504108664821580e-2;
  p = p * f + 2.4022650695910071e-1;
  p = p * f + 6.9314718055994531e-1;
  return p * f + 1.0;
}

template <class T>
VITZOO_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> shifted) {
  typedef typename Simd<T>::I I;
  return (Vec<T>)((I)p + ((I)shifted << Simd<T>::mantissa));
}

// 2^(x y). Below the smallest normal number it stays there (1e-38 in float), above the largest it is
// infinite. Without `Clamp` |x y| must be below kPlainExponent; the product is then not even rounded where
// there are fused operations.
template <class T, bool Clamp>
VITZOO_INLINE Vec<T> exp2_product(Vec<T> x, Vec<T> y) {
  if constexpr (Clamp) {
    const Vec<T> z = at_most<T>(at_least<T>(x * y, Simd<T>::min_exponent), Simd<T>::max_exponent);
    const Vec<T> shifted = z + Simd<T>::magic;
    return scale_by_power<T>(exp2_fraction(z - (shifted - Simd<T>::magic)), shifted);
  } else {
    const Vec<T> shifted = x * y + Simd<T>::magic;
    return scale_by_power<T>(exp2_fraction(x * y - (shifted - Simd<T>::magic)), shifted);
  }
}

template <class T>
constexpr T kPlainExponent = Simd<T>::max_exponent - 3;

template <class T>
VITZOO_INLINE bool all_below(Vec<T> x, T limit) {
  bool below = true;
  for (int i = 0; i < Simd<T>::W; ++i) {
    below = below && x[i] < limit;
  }
  return below;
}

// e^x for x <= 0, to the last bit or two also where x is large: the argument is reduced before it is
// multiplied.
template <class T>
VITZOO_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  x = at_least<T>(x, Simd<T>::min_exponent * T(0.6931471805599453));
  const Vec<T> shifted = x * T(kLog2e) + Simd<T>::magic;
  const Vec<T> n = shifted - Simd<T>::magic;
  const Vec<T> r = (x - n * Simd<T>::ln2_hi) - n * Simd<T>::ln2_lo;
  return scale_by_power<T>(exp2_fraction(r * T(kLog2e)), shifted);
}

template <class T>
VITZOO_INLINE Vec<T> absolute(Vec<T> x) {
  typedef typename Simd<T>::I I;
  const I sign = (I)broadcast<T>(T(-0.0));
  return (Vec<T>)((I)x & ~sign);
}

// log(1 + e) for e in [0, 1]: 2 artanh(w) with w = e / (2 + e) <= 1/3, relative error below the rounding.
template <class T>
VITZOO_INLINE Vec<T> log1p_unit(Vec<T> e) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const Vec<T> w = e / (e + T(2));
  const Vec<T> square = w * w;
  Vec<T> p = broadcast<T>(T(2) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 0; --k) {
    p = p * square + T(2) / T(2 * k + 1);
  }
  return p * w;
}

template <class T>
struct Softplus {
  Vec<T> value, slope;
};

// softplus as PyTorch defines it (the identity above 20) and its derivative.
template <class T>
VITZOO_INLINE Softplus<T> softplus(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-absolute<T>(x));
  const Vec<T> s = T(1) / (e + T(1));
  Softplus<T> out;
  out.value = x > T(20) ? x : at_least<T>(x, T(0)) + log1p_unit<T>(e);
  out.slope = x > T(20) ? broadcast<T>(T(1)) : (x >= T(0) ? s : e * s);
  return out;
}

template <class T>
VITZOO_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-absolute<T>(x));
  const Vec<T> s = T(1) / (e + T(1));
  return x >= T(0) ? s : e * s;
}

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
