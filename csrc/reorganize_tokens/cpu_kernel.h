// Token reorganization for one instruction set: one pass over the rows of an image, each copied to its place
// or added to the fused token.
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::ReorganizeArgs;

template <class T, class S>
inline void forward_image(const ReorganizeArgs& k, int64_t image, T* sum) {
  const int64_t count = k.length - 1, C = k.channels;
  const S* const x = static_cast<const S*>(k.x) + image * k.length * C;
  const T* const scores = static_cast<const T*>(k.scores) + image * count;
  const int64_t* const place = k.place + image * count;
  S* const tokens = static_cast<S*>(k.tokens) + image * (1 + k.keep + k.fuse) * C;
  for (int64_t c = 0; c < C; ++c) {
    sum[c] = 0;
  }
  __builtin_memcpy(tokens, x, sizeof(S) * size_t(C));
  for (int64_t t = 0; t < count; ++t) {
    const S* const row = x + (1 + t) * C;
    if (place[t] >= 0) {
      __builtin_memcpy(tokens + (1 + place[t]) * C, row, sizeof(S) * size_t(C));
    } else if (k.fuse) {
      const T score = scores[t];
      for (int64_t c = 0; c < C; ++c) {
        sum[c] += score * widen(row[c]);
      }
    }
  }
  if (k.fuse) {
    S* const fused = tokens + (1 + k.keep) * C;
    for (int64_t c = 0; c < C; ++c) {
      narrow(sum[c], fused + c);
    }
  }
}

template <class T, class S>
inline void backward_image(const ReorganizeArgs& k, int64_t image, T* dfused) {
  constexpr int W = Simd<T>::W;
  const int64_t count = k.length - 1, C = k.channels;
  const S* const x = static_cast<const S*>(k.x) + image * k.length * C;
  const T* const scores = static_cast<const T*>(k.scores) + image * count;
  const int64_t* const place = k.place + image * count;
  const S* const dtokens = static_cast<const S*>(k.tokens) + image * (1 + k.keep + k.fuse) * C;
  S* const dx = static_cast<S*>(k.dx) + image * k.length * C;
  T* const dscores = static_cast<T*>(k.dscores) + image * count;
  for (int64_t c = 0; c < C; ++c) {
    dfused[c] = k.fuse ? widen(dtokens[(1 + k.keep) * C + c]) : T(0);
  }
  __builtin_memcpy(dx, dtokens, sizeof(S) * size_t(C));
  for (int64_t t = 0; t < count; ++t) {
    S* const drow = dx + (1 + t) * C;
    dscores[t] = 0;
    if (place[t] >= 0) {
      __builtin_memcpy(drow, dtokens + (1 + place[t]) * C, sizeof(S) * size_t(C));
      continue;
    }
    const S* const row = x + (1 + t) * C;
    Vec<T> sum{};
    for (int64_t c = 0; c < C; c += W) {
      const int lanes = C - c < W ? int(C - c) : W;
      const Vec<T> d = load_row<T>(dfused + c, lanes);
      store_row<T>(drow + c, scores[t] * d, lanes);
      if (k.fuse) {
        sum += d * load_row<T>(row + c, lanes);
      }
    }
    for (int i = 0; i < W; ++i) {
      dscores[t] += sum[i];
    }
  }
}

template <class T>
void forward(const ReorganizeArgs& k, int64_t begin, int64_t end, void* scratch) {
  T* const sum = static_cast<T*>(scratch);
  for (int64_t image = begin; image < end; ++image) {
    if constexpr (sizeof(T) == 8) {
      forward_image<T, T>(k, image, sum);
    } else if (k.kind == Kind::bf16) {
      forward_image<T, BFloat16>(k, image, sum);
    } else if (k.kind == Kind::f16) {
      forward_image<T, Float16>(k, image, sum);
    } else {
      forward_image<T, T>(k, image, sum);
    }
  }
}

template <class T>
void backward(const ReorganizeArgs& k, int64_t begin, int64_t end, void* scratch) {
  T* const dfused = static_cast<T*>(scratch);
  for (int64_t image = begin; image < end; ++image) {
    if constexpr (sizeof(T) == 8) {
      backward_image<T, T>(k, image, dfused);
    } else if (k.kind == Kind::bf16) {
      backward_image<T, BFloat16>(k, image, dfused);
    } else if (k.kind == Kind::f16) {
      backward_image<T, Float16>(k, image, dfused);
    } else {
      backward_image<T, T>(k, image, dfused);
    }
  }
}

constexpr vitzoo::ReorganizeKernels kKernels = {forward<float>, forward<double>, backward<float>,
                                                backward<double>};

}  // namespace
