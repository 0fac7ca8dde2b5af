// Small matrix products for one instruction set: operands that a kernel has packed into its scratch memory, a
// few dozen rows and columns each. Include after simd.h.
#pragma once

#include "simd_memory.h"

namespace {

// How a product enters its result: C = A B, C += A B, or C = factor C + A B.
enum class Write : int { store, add, scale };

// Which part of a triangular product is formed, by blocks of rows: everything; the terms k < end of the block
// (A lower triangular); k >= its start (A upper triangular); the columns < its end (C lower triangular).
enum class Part : int { full, lower, upper, columns };

template <class T>
struct Factor {  // element (i, k) is p[i * row + k * column]
  const T* p;
  int64_t row, column;
};

#if VITZOO_VECTOR_BYTES == 64
constexpr int kGemmRows = 8;
#else
constexpr int kGemmRows = 6;
#endif
constexpr int kGemmVectors = 2;

template <class T, int MR, int NV>
VITZOO_INLINE void gemm_block(int64_t first, int64_t last, const T* a, int64_t row, int64_t column,
                              const T* b, int64_t ldb, T* c, int64_t ldc, Write write, T factor) {
  constexpr int W = Simd<T>::W;
  Vec<T> sum[MR][NV] = {};
  a += first * column;
  b += first * ldb;
  for (int64_t k = first; k < last; ++k, a += column, b += ldb) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      __builtin_memcpy(&right[j], b + j * W, sizeof(Vec<T>));
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec<T> left = broadcast<T>(a[i * row]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        sum[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* const p = c + i * ldc + j * W;
      Vec<T> old;
      if (write != Write::store) {
        __builtin_memcpy(&old, p, sizeof(old));
        sum[i][j] += write == Write::add ? old : old * factor;
      }
      __builtin_memcpy(p, &sum[i][j], sizeof(Vec<T>));
    }
  }
}

template <class T, int MR>
inline void gemm_rows(int64_t start, int64_t n, int64_t k, Factor<T> a, const T* b, int64_t ldb, T* c,
                      int64_t ldc, Write write, Part part, T factor) {
  constexpr int W = Simd<T>::W;
  const int64_t end = start + MR;
  const int64_t first = part == Part::upper && start < k ? start : 0;
  const int64_t last = part == Part::lower && end < k ? end : k;
  const int64_t columns = part == Part::columns && end < n ? end : n;
  const T* const left = a.p + start * a.row;
  int64_t j = 0;
  for (; j + (kGemmVectors - 1) * W < columns; j += kGemmVectors * W) {
    gemm_block<T, MR, kGemmVectors>(first, last, left, a.row, a.column, b + j, ldb, c + start * ldc + j, ldc,
                                    write, factor);
  }
  for (; j < columns; j += W) {
    gemm_block<T, MR, 1>(first, last, left, a.row, a.column, b + j, ldb, c + start * ldc + j, ldc, write,
                         factor);
  }
}

// C (m, n) from A (m, k) and B (k, n), whose rows, like those of C, are padded to whole vectors: columns up
// to the next multiple of W are read and written.
template <class T>
inline void gemm(int64_t m, int64_t n, int64_t k, Factor<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                 Write write, Part part = Part::full, T factor = T(0)) {
  int64_t i = 0;
  for (; i + kGemmRows <= m; i += kGemmRows) {
    gemm_rows<T, kGemmRows>(i, n, k, a, b, ldb, c, ldc, write, part, factor);
  }
  for (; i + 4 <= m; i += 4) {
    gemm_rows<T, 4>(i, n, k, a, b, ldb, c, ldc, write, part, factor);
  }
  for (; i < m; ++i) {
    gemm_rows<T, 1>(i, n, k, a, b, ldb, c, ldc, write, part, factor);
  }
}

}  // namespace
