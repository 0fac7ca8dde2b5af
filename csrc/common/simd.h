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

// exp2 in float reads the leading bits of the fraction from a table that fits one register, where a
// permutation of its lanes costs one instruction; the polynomial is then of degree 3 instead of 6.
#if defined(__x86_64__) && VITZOO_VECTOR_BYTES >= 32
#define VITZOO_EXP_TABLE 1
#endif

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VITZOO_VECTOR_BYTES)));
  static constexpr int W = VITZOO_VECTOR_BYTES / 4;
#ifdef VITZOO_EXP_TABLE
  static constexpr int table_bits = W == 16 ? 4 : 3;
#else
  static constexpr int table_bits = 0;
#endif
  static constexpr int mantissa = 23 - table_bits;
  static constexpr float magic =
      12582912.0f / (1 << table_bits);  // 1.5 * 2^mantissa: adding it rounds to a fixed point in the low bits
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

// x, which the compiler may then not fuse with an operation that follows.
template <class V>
VITZOO_INLINE V rounded(V x) {
#if defined(__x86_64__) && VITZOO_VECTOR_BYTES == 64
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#endif
  return x;
}

template <class T>
VITZOO_INLINE Vec<T> at_least(Vec<T> x, T low) {
  return larger(broadcast<T>(low), x);
}

template <class T>
VITZOO_INLINE Vec<T> at_most(Vec<T> x, T high) {
  return smaller(broadcast<T>(high), x);
}

// 2^f where f is what `shifted`, x + magic, left of x. In float by polynomials that are minimax under p(0) =
// 1: relative error 2e-9 on [-1/2, 1/2] and [-1/32, 1/32], 3e-8 on [-1/16, 1/16]. The slope at 0 is ln 2 to
// 1e-7, so that slow decays, which add up over many tokens, have the right rate. For double the Taylor series
// to degree 13, 4e-18.
#ifdef VITZOO_EXP_TABLE
VITZOO_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  constexpr bool fine = Simd<float>::table_bits == 4;
  Vec<float> p = f * (fine ? 5.55056520e-2f : 5.54962233e-2f) + (fine ? 2.40226984e-1f : 2.40257636e-1f);
  p = p * f + (fine ? 6.93147182e-1f : 6.93147242e-1f);
  return p * f + 1.0f;
}
#else
VITZOO_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = f * 1.53533620e-4f + 1.33988739e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  return p * f + 1.0f;
}
#endif

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

// p 2^n for the fixed-point number n in the low bits of `shifted`.
template <class T>
VITZOO_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> shifted) {
  typedef typename Simd<T>::I I;
#ifdef VITZOO_EXP_TABLE
  if constexpr (sizeof(T) == 4) {
    // The bits of 2^(j / size) less those that j itself leaves below the exponent.
#if VITZOO_VECTOR_BYTES == 64
    alignas(64) static constexpr uint32_t table[16] = {
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    const I fraction = (I)_mm512_permutexvar_epi32((__m512i)shifted, _mm512_load_si512(table));
#else
    alignas(32) static constexpr uint32_t table[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                      0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const I fraction = (I)_mm256_permutevar8x32_epi32(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(table)), (__m256i)shifted);
#endif
    return p * (Vec<T>)(fraction + ((I)shifted << Simd<T>::mantissa));
  }
#endif
  return (Vec<T>)((I)p + ((I)shifted << Simd<T>::mantissa));
}

// 2^(x y). Below the smallest normal number it stays there (1e-38 in float), above the largest it is
// infinite. Without `Clamp` |x y| must be below kPlainExponent.
template <class T, bool Clamp>
VITZOO_INLINE Vec<T> exp2_product(Vec<T> x, Vec<T> y) {
  Vec<T> z = x * y;
  if constexpr (Clamp) {
    z = at_most<T>(at_least<T>(z, Simd<T>::min_exponent), Simd<T>::max_exponent);
  } else {
    // Fused with what follows, the product would be made twice; the adders are idle, the multipliers are not.
    z = rounded(z);
  }
  const Vec<T> shifted = z + Simd<T>::magic;
  return scale_by_power<T>(exp2_fraction(z - (shifted - Simd<T>::magic)), shifted);
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

// e^x for low <= x <= high, to the last bit or two also where |x| is large: the argument is reduced before it
// is multiplied.
template <class T>
VITZOO_INLINE Vec<T> exp_bounded(Vec<T> x) {
  const Vec<T> shifted = x * T(kLog2e) + Simd<T>::magic;
  const Vec<T> n = shifted - Simd<T>::magic;
#ifdef VITZOO_EXP_TABLE
  // float(ln 2) is right to 3e-9, and the product is not rounded
  const Vec<T> r =
      sizeof(T) == 4 ? x - n * T(0.6931471805599453) : (x - n * Simd<T>::ln2_hi) - n * Simd<T>::ln2_lo;
#else
  const Vec<T> r = (x - n * Simd<T>::ln2_hi) - n * Simd<T>::ln2_lo;
#endif
  return scale_by_power<T>(exp2_fraction(r * T(kLog2e)), shifted);
}

template <class T>
VITZOO_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  return exp_bounded<T>(at_least<T>(x, Simd<T>::min_exponent * T(0.6931471805599453)));
}

template <class T>
VITZOO_INLINE Vec<T> absolute(Vec<T> x) {
  typedef typename Simd<T>::I I;
  const I sign = (I)broadcast<T>(T(-0.0));
  return (Vec<T>)((I)x & ~sign);
}

template <class T>
VITZOO_INLINE Vec<T> minus_absolute(Vec<T> x) {
  typedef typename Simd<T>::I I;
  return (Vec<T>)((I)x | (I)broadcast<T>(T(-0.0)));
}

// 1 / x for 1 <= x <= 2^126. Where there is an estimate to 14 bits, one Newton step takes a third of the time
// of a division and is right to the last bit or two.
VITZOO_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
VITZOO_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__x86_64__) && VITZOO_VECTOR_BYTES == 64
  const Vec<float> guess = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// log(1 + e) for e in [0, 1]: in float e times a minimax polynomial, relative error 5e-8; in double
// 2 artanh(w) with w = e / (2 + e) <= 1/3, relative error below the rounding.
VITZOO_INLINE Vec<float> log1p_unit(Vec<float> e) {
  Vec<float> p = e * 5.36467135e-3f - 3.00652087e-2f;
  p = p * e + 7.92036429e-2f;
  p = p * e - 1.37537315e-1f;
  p = p * e + 1.91536248e-1f;
  p = p * e - 2.48571575e-1f;
  p = p * e + 3.33213210e-1f;
  p = p * e - 4.99996483e-1f;
  return p * e * e + e;
}

VITZOO_INLINE Vec<double> log1p_unit(Vec<double> e) {
  constexpr int terms = 17;
  const Vec<double> w = e / (e + 2.0);
  const Vec<double> square = w * w;
  Vec<double> p = broadcast<double>(2.0 / (2 * terms - 1));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 0; --k) {
    p = p * square + 2.0 / (2 * k + 1);
  }
  return p * w;
}

template <class T>
struct Softplus {
  Vec<T> value, slope;
};

// softplus as PyTorch defines it (the identity above 20, which in float the rounding sees to) and its
// derivative.
template <class T>
VITZOO_INLINE Softplus<T> softplus(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(minus_absolute<T>(x));
  const Vec<T> s = reciprocal(e + T(1));
  Softplus<T> out;
  out.value = at_least<T>(x, T(0)) + log1p_unit(e);
  out.slope = x >= T(0) ? s : e * s;
  if constexpr (sizeof(T) == 8) {
    out.value = x > T(20) ? x : out.value;
    out.slope = x > T(20) ? broadcast<T>(T(1)) : out.slope;
  }
  return out;
}

// 1 / (1 + e^-x); below -87 in float and -693 in double it stays what it is there.
template <class T>
VITZOO_INLINE Vec<T> sigmoid(Vec<T> x) {
  constexpr T limit = (Simd<T>::max_exponent - 3) * T(0.6931471805599453);
  return reciprocal(exp_bounded<T>(at_most<T>(at_least<T>(-x, -limit), limit)) + T(1));
}

}  // namespace
