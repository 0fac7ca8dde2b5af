// int8_linear: x is turned into codes row by row, or several rows at once where they lie side by side, the
// weight into panels of a few vectors of columns, and each panel is multiplied with tiles of six rows whose
// sums stay in registers. One lane holds one column and takes `step` codes along K at once: four bytes by the
// 8-bit dot product, or two 16-bit numbers by the multiply-add that every x86-64 has. Neither can saturate:
// vpdpbusd adds in 32 bits, and 16-bit codes are at most 255 by 128. Products of floating-point numbers are
// never fused with sums, so that every CPU gives the same bits.
#pragma once

#include "../common/no_contraction.h"
#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::Activation;
using vitzoo::CodeKind;
using vitzoo::Int8LinearArgs;
using vitzoo::kMaxColumns;
using vitzoo::kRowBlock;
using vitzoo::kTileRows;

typedef Vec<float> F;
typedef Simd<float>::I I;
constexpr int W = Simd<float>::W;
constexpr int kVectors = VITZOO_VECTOR_BYTES == 64 ? 4 : 2;  // of a panel
constexpr int kColumns = kVectors * W;
#if defined(VITZOO_VNNI)
typedef uint8_t Code;
constexpr int kStep = 4;
#else
typedef int16_t Code;
constexpr int kStep = 2;
#endif
static_assert(kColumns <= kMaxColumns, "");

VITZOO_INLINE int64_t steps_of(const Int8LinearArgs& k) { return (k.depth + kStep - 1) / kStep; }

// What the packed codes of x are above the codes less their zero point: u8 codes go as they are, s8 codes 128
// higher, and 16-bit ones already without the zero point.
VITZOO_INLINE int32_t packed_zero(const Int8LinearArgs& k) {
#if defined(VITZOO_VNNI)
  return k.x_zero - k.x_low;
#else
  return 0;
#endif
}

// Adds to each lane the sum of the products of its `step` codes.
VITZOO_INLINE I dot(I sum, I x, I weight) {
#if defined(VITZOO_VNNI) && VITZOO_VECTOR_BYTES == 64
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(VITZOO_VNNI)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)weight);
#elif defined(__x86_64__)
  return sum + (I)VITZOO_X86(madd_epi16)((VITZOO_X86_TYPE(i))x, (VITZOO_X86_TYPE(i))weight);
#else
  const I x_low = (x << 16) >> 16, weight_low = (weight << 16) >> 16;
  return sum + x_low * weight_low + (x >> 16) * (weight >> 16);
#endif
}

// Codes
// ---------------------------------------------------------------------------------------------------------

// Adding it rounds to an integer held in the low bits.
constexpr float kMagic = 12582912.0f;

VITZOO_INLINE I nearest(F x) {  // ties to even; |x| below 2^22
  return (I)(x + kMagic) - (I)broadcast<float>(kMagic);
}

// round(x / scale) between low and high; 0 where x / scale is not a number.
VITZOO_INLINE I code_of(F x, F scale, float low, float high) {
  F v = x / scale;
  v = v == v ? v : F{};
  return nearest(at_most<float>(at_least<float>(v, low), high));
}

template <class S>
inline float scale_of_row(const S* x, int64_t depth) {
  // as integers, magnitudes are in the same order and NaN is above infinity
  I largest{};
  for (int64_t i = 0; i < depth; i += W) {
    const int count = depth - i < W ? int(depth - i) : W;
    const I magnitude = (I)absolute<float>(load_row<float>(x + i, count));
    largest = largest > magnitude ? largest : magnitude;
  }
  int32_t found = 0;
  for (int i = 0; i < W; ++i) {
    found = largest[i] > found ? largest[i] : found;
  }
  const float magnitude = bit_cast<float>(found);
  return (magnitude < 1e-30f ? 1e-30f : magnitude) / 127.0f;
}

// Writes the codes of the first `count` lanes.
VITZOO_INLINE void pack(const Int8LinearArgs& k, F x, F scale, int count, Code* out) {
  // packed = code - x_zero + packed_zero, all of it in one range
  const float low = float(k.x_low - k.x_zero), high = float(k.x_high - k.x_zero);
  const I codes = code_of(x, scale, low, high) + packed_zero(k);
  if (count == W) {
    typedef Code Packed __attribute__((vector_size(W * sizeof(Code))));
    const Packed packed = __builtin_convertvector(codes, Packed);
    __builtin_memcpy(out, &packed, sizeof(packed));
  } else {
    for (int j = 0; j < count; ++j) {
      out[j] = Code(codes[j]);
    }
  }
}

template <class S>
inline void pack_row(const Int8LinearArgs& k, const S* x, float scale, Code* out) {
  const F scales = broadcast<float>(scale);
  int64_t i = 0;
  for (; i + W <= k.depth; i += W) {
    pack(k, load_row<float>(x + i, W), scales, W, out + i);
  }
  if (i < k.depth) {
    pack(k, load_row<float>(x + i, int(k.depth - i)), scales, int(k.depth - i), out + i);
  }
}

// What `scale_of_row` gives for each of up to W rows that lie side by side.
inline F scales_of_rows(const Int8LinearArgs& k, const float* x, int rows) {
  I largest{};
  for (int64_t i = 0; i < k.depth; ++i) {
    const I magnitude = (I)absolute<float>(load_row<float>(x + i * k.x_step, rows));
    largest = largest > magnitude ? largest : magnitude;
  }
  const F magnitude = (F)largest;
  return (magnitude < 1e-30f ? broadcast<float>(1e-30f) : magnitude) / 127.0f;
}

// Up to W rows at once, turned in registers.
void pack_side_by_side(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  const int64_t stride = k.codes_stride;
  for (int64_t m = begin, rows; m < end; m += rows) {
    const int64_t first = m % k.side_by_side;
    const int64_t left = k.side_by_side - first < end - m ? k.side_by_side - first : end - m;
    rows = left < W ? left : W;
    const float* const x = static_cast<const float*>(k.x) + m / k.side_by_side * k.x_stride + first;
    const F scales = k.x_scale == nullptr ? scales_of_rows(k, x, int(rows))
                     : k.scale_a_row      ? load_row<float>(k.x_scale + m, int(rows))
                                          : broadcast<float>(*k.x_scale);
    store_row<float>(k.row_scale + m, scales, int(rows));
    Code* const out = static_cast<Code*>(k.packed_x) + m * stride;
    for (int64_t i = 0; i < k.depth; i += W) {
      const int count = k.depth - i < W ? int(k.depth - i) : W;
      F v[W];
      for (int j = 0; j < W; ++j) {
        v[j] = j < count ? load_row<float>(x + (i + j) * k.x_step, int(rows)) : F{};
      }
      transpose_step<float, 1>(v);
      for (int r = 0; r < rows; ++r) {
        pack(k, v[r], broadcast<float>(scales[r]), count, out + r * stride + i);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int64_t i = k.depth; i < stride; ++i) {
        out[r * stride + i] = 0;
      }
    }
  }
}

template <class S>
inline void copy_row(const Int8LinearArgs& k, const S* x, Code* out) {
  // bytes may alias anything: the bound has to be seen not to change
  const int64_t depth = k.depth;
  const int32_t shift = packed_zero(k) - k.x_zero;
  for (int64_t i = 0; i < depth; ++i) {
    out[i] = Code(int32_t(x[i]) + shift);
  }
}

template <class S>
inline void pack_rows(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  const int64_t stride = k.codes_stride;
  for (int64_t m = begin; m < end; ++m) {
    const S* const x = static_cast<const S*>(k.x) + m * k.x_stride;
    Code* const out = static_cast<Code*>(k.packed_x) + m * stride;
    const float scale = k.x_scale != nullptr ? k.x_scale[k.scale_a_row ? m : 0] : scale_of_row(x, k.depth);
    k.row_scale[m] = scale;
    pack_row(k, x, scale, out);
    for (int64_t i = k.depth; i < stride; ++i) {
      out[i] = 0;
    }
  }
}

template <class S>
inline void copy_rows(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  const int64_t stride = k.codes_stride;
  for (int64_t m = begin; m < end; ++m) {
    k.row_scale[m] = k.x_scale[k.scale_a_row ? m : 0];
    if (k.packed_x == nullptr) {
      continue;
    }
    Code* const out = static_cast<Code*>(k.packed_x) + m * stride;
    copy_row(k, static_cast<const S*>(k.x) + m * k.x_stride, out);
    for (int64_t i = k.depth; i < stride; ++i) {
      out[i] = 0;
    }
  }
}

void pack_x(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  if (k.side_by_side > 0) {
    return pack_side_by_side(k, begin, end);
  }
  switch (k.x_kind) {
    case CodeKind::s8:
      return copy_rows<int8_t>(k, begin, end);
    case CodeKind::u8:
      return copy_rows<uint8_t>(k, begin, end);
    case CodeKind::bf16:
      return pack_rows<BFloat16>(k, begin, end);
    case CodeKind::f16:
      return pack_rows<Float16>(k, begin, end);
    default:
      return pack_rows<float>(k, begin, end);
  }
}

// Weight
// ---------------------------------------------------------------------------------------------------------

// W steps of one column as the lanes of a vector; what lies beyond the depth is zero.
VITZOO_INLINE F load_steps(const int8_t* p, int64_t count) {
  typedef int8_t Bytes __attribute__((vector_size(W * kStep)));
  Bytes bytes{};
  if (count >= W * kStep) {
    __builtin_memcpy(&bytes, p, sizeof(bytes));
  } else if (count > 0) {
    int8_t values[W * kStep] = {};
    for (int64_t i = 0; i < count; ++i) {
      values[i] = p[i];
    }
    __builtin_memcpy(&bytes, values, sizeof(bytes));
  }
#if defined(VITZOO_VNNI)
  return (F)bytes;
#else
  typedef int16_t Wide __attribute__((vector_size(W * kStep * 2)));
  return (F) __builtin_convertvector(bytes, Wide);
#endif
}

// A panel is (steps, columns, step) codes.
void pack_weight(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(k);
  for (int64_t panel = begin; panel < end; ++panel) {
    F* const out = static_cast<F*>(k.packed_weight) + panel * steps * kVectors;
    for (int j = 0; j < kVectors; ++j) {
      const int64_t first = panel * kColumns + j * W;
      for (int64_t s = 0; s < steps; s += W) {
        F v[W];
        for (int r = 0; r < W; ++r) {
          v[r] = first + r < k.columns
                     ? load_steps(k.weight + (first + r) * k.depth + s * kStep, k.depth - s * kStep)
                     : F{};
        }
        transpose_step<float, 1>(v);
        for (int64_t t = 0; t < W && s + t < steps; ++t) {
          out[(s + t) * kVectors + j] = v[t];
        }
      }
    }
    for (int64_t n = panel * kColumns; n < (panel + 1) * kColumns; ++n) {
      int32_t sum = 0;
      if (n < k.columns && packed_zero(k) != 0) {
        for (int64_t i = 0; i < k.depth; ++i) {
          sum += k.weight[n * k.depth + i];
        }
      }
      k.weight_sums[n] = sum;
    }
  }
}

// Products
// ---------------------------------------------------------------------------------------------------------

VITZOO_INLINE I broadcast_step(const Code* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits - I{};
}

// sums (R, vectors) of R rows with the first V vectors of a panel.
template <int R, int V>
inline void tile(const Code* x, int64_t stride, const I* weight, int64_t steps, I* out) {
  I sum[R][V] = {};
  for (int64_t s = 0; s < steps; ++s) {
    I columns[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      columns[j] = weight[s * kVectors + j];
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const I codes = broadcast_step(x + r * stride + s * kStep);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        sum[r][j] = dot(sum[r][j], codes, columns[j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      out[r * kVectors + j] = sum[r][j];
    }
  }
}

template <int V>
__attribute__((noinline)) void tile_of(int64_t rows, const Code* x, int64_t stride, const I* weight,
                                       int64_t steps, I* out) {
  switch (rows) {
    case 1:
      return tile<1, V>(x, stride, weight, steps, out);
    case 2:
      return tile<2, V>(x, stride, weight, steps, out);
    case 3:
      return tile<3, V>(x, stride, weight, steps, out);
    case 4:
      return tile<4, V>(x, stride, weight, steps, out);
    case 5:
      return tile<5, V>(x, stride, weight, steps, out);
    default:
      return tile<6, V>(x, stride, weight, steps, out);
  }
}

using Tile = void (*)(int64_t rows, const Code* x, int64_t stride, const I* weight, int64_t steps, I* out);

// The last panel has fewer columns: its empty vectors are not multiplied.
inline Tile tile_for(int64_t columns) {
  if constexpr (kVectors == 4) {
    if (columns <= 2 * W) {
      return columns <= W ? tile_of<1> : tile_of<2>;
    }
    return columns <= 3 * W ? tile_of<3> : tile_of<4>;
  } else {
    return columns <= W ? tile_of<1> : tile_of<2>;
  }
}

// e^x for x <= 0, down to the smallest normal number. The one of simd.h has a table as wide as the vectors,
// and so not the same bits on every CPU.
VITZOO_INLINE F exp_of(F x) {
  x = at_least<float>(x, -87.3365448f);
  const F shifted = x * float(kLog2e) + kMagic;
  const F n = shifted - kMagic;
  const F f = ((x - n * 0.693359375f) - n * -2.12194440e-4f) * float(kLog2e);
  F p = f * 1.53533620e-4f + 1.33988739e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return (F)((I)p + ((I)shifted << 23));
}

// x Phi(x). With t = |x| and u = 1 / (1 + 0.26 t), Phi(-t) = exp(-t^2 / 2) u P(u); P is a fit of degree 8 to
// 4e-8, relative, so that the negative tail is right too.
VITZOO_INLINE F gelu(F x) {
  const F t = absolute<float>(x);
  const F u = 1.0f / (t * 0.26f + 1.0f);
  F p = u * 2.943629e-2f + -1.4766759e-1f;
  p = p * u + 0.24089859f;
  p = p * u + -0.13891293f;
  p = p * u + 0.15268741f;
  p = p * u + 0.05452543f;
  p = p * u + 0.10213994f;
  p = p * u + 0.10314107f;
  p = p * u + 0.10375178f;
  const F tail = exp_of(t * t * -0.5f) * (u * p);
  return x * (x >= 0.0f ? 1.0f - tail : tail);
}

struct Panel {  // what the epilogue needs of the columns of a panel
  I correction[kVectors];
  F scale[kVectors], bias[kVectors];
};

VITZOO_INLINE int lanes_of(const Int8LinearArgs& k, int64_t column) {
  const int64_t left = k.columns - column;
  return left >= W ? W : left > 0 ? int(left) : 0;
}

inline Panel panel_of(const Int8LinearArgs& k, int64_t first) {
  Panel panel;
  for (int j = 0; j < kVectors; ++j) {
    const int64_t n = first + j * W;
    const int lanes = lanes_of(k, n);
    I sums;
    __builtin_memcpy(&sums, k.weight_sums + n, sizeof(sums));
    panel.correction[j] = sums * packed_zero(k);
    panel.scale[j] = lanes > 0 ? load_row<float>(k.weight_scale + n, lanes) : F{};
    panel.bias[j] = k.bias != nullptr && lanes > 0 ? load_row<float>(k.bias + n, lanes) : F{};
  }
  return panel;
}

template <class S>
VITZOO_INLINE void store_result(const Int8LinearArgs& k, S* p, F y, int lanes) {
  if constexpr (sizeof(S) > 1) {
    store_row<float>(p, y, lanes);
  } else {
    const float low = float(k.out_low - k.out_zero), high = float(k.out_high - k.out_zero);
    const I codes = code_of(y, broadcast<float>(k.out_scale), low, high) + k.out_zero;
    if (lanes == W) {
      typedef S Codes __attribute__((vector_size(W)));
      const Codes narrow_codes = __builtin_convertvector(codes, Codes);
      __builtin_memcpy(p, &narrow_codes, W);
    } else {
      for (int i = 0; i < lanes; ++i) {
        p[i] = S(codes[i]);
      }
    }
  }
}

template <class S, Activation A>
inline void finish(const Int8LinearArgs& k, const Panel& panel, const I* sums, int64_t row, int64_t rows,
                   int64_t first) {
  for (int64_t r = 0; r < rows; ++r) {
    S* const out = static_cast<S*>(k.out) + (row + r) * k.columns + first;
    const F scale = broadcast<float>(k.row_scale[row + r]);
    for (int j = 0; j < kVectors; ++j) {
      const int lanes = lanes_of(k, first + j * W);
      if (lanes == 0) {
        break;
      }
      F y =
          __builtin_convertvector(sums[r * kVectors + j] - panel.correction[j], F) * (scale * panel.scale[j]);
      if (k.bias != nullptr) {
        y = y + panel.bias[j];
      }
      if constexpr (A == Activation::gelu) {
        y = gelu(y);
      } else if constexpr (A == Activation::relu) {
        y = y < 0.0f ? F{} : y;
      }
      store_result<S>(k, out + j * W, y, lanes);
    }
  }
}

template <class S, Activation A>
inline void multiply_of(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(k), stride = k.codes_stride;
  const int64_t blocks = (k.rows + kRowBlock - 1) / kRowBlock;
  const Code* const x = static_cast<const Code*>(k.codes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t number = item / blocks, block = item % blocks;
    const I* const weight = static_cast<const I*>(k.packed_weight) + number * steps * kVectors;
    const Panel panel = panel_of(k, number * kColumns);
    const Tile tile = tile_for(k.columns - number * kColumns);
    const int64_t last = (block + 1) * kRowBlock < k.rows ? (block + 1) * kRowBlock : k.rows;
    for (int64_t row = block * kRowBlock; row < last; row += kTileRows) {
      const int64_t rows = last - row < kTileRows ? last - row : kTileRows;
      I sums[kTileRows * kVectors];
      tile(rows, x + row * stride, stride, weight, steps, sums);
      finish<S, A>(k, panel, sums, row, rows, number * kColumns);
    }
  }
}

template <class S>
inline void multiply_to(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  switch (k.activation) {
    case Activation::gelu:
      return multiply_of<S, Activation::gelu>(k, begin, end);
    case Activation::relu:
      return multiply_of<S, Activation::relu>(k, begin, end);
    default:
      return multiply_of<S, Activation::none>(k, begin, end);
  }
}

void multiply(const Int8LinearArgs& k, int64_t begin, int64_t end) {
  switch (k.out_kind) {
    case CodeKind::s8:
      return multiply_to<int8_t>(k, begin, end);
    case CodeKind::u8:
      return multiply_to<uint8_t>(k, begin, end);
    case CodeKind::bf16:
      return multiply_to<BFloat16>(k, begin, end);
    case CodeKind::f16:
      return multiply_to<Float16>(k, begin, end);
    default:
      return multiply_to<float>(k, begin, end);
  }
}

const vitzoo::Int8LinearKernels kKernels = {kColumns, kStep, sizeof(Code), pack_x, pack_weight, multiply};

}  // namespace
