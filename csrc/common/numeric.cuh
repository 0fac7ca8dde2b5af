// Numbers inside CUDA kernels: exponentials, and rows of tokens in float32, bfloat16 or float16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "exec.cuh"
#include "view.h"

namespace vitzoo {

constexpr float kLog2E = 1.4426950408889634f;

// 2^x to 2 units in the last place; results under 2^-126 are zero on the device.
VITZOO_DEVICE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

VITZOO_DEVICE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  return std::exp(x);
#endif
}

VITZOO_DEVICE float expm1_of(float x) {
#ifdef __CUDA_ARCH__
  return ::expm1f(x);
#else
  return std::expm1(x);
#endif
}

VITZOO_DEVICE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// PyTorch's softplus: the identity above 20.
VITZOO_DEVICE float softplus_of(float x) {
#ifdef __CUDA_ARCH__
  return x > 20.0f ? x : ::log1pf(exp_of(x));
#else
  return x > 20.0f ? x : std::log1p(exp_of(x));
#endif
}

template <class T, int K>
struct alignas(sizeof(T) * K < 16 ? sizeof(T) * K : 16) Pack {
  T values[K];
};

template <class T, int K>
VITZOO_DEVICE bool fits_pack(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, K>) == 0;
}

// Reads K consecutive elements of which the first `valid` exist; the others are zero.
template <class T, int K>
VITZOO_DEVICE void load_pack(const T* p, int64_t valid, float (&out)[K]) {
  if (valid >= K && fits_pack<T, K>(p)) {
    const Pack<T, K> pack = *reinterpret_cast<const Pack<T, K>*>(p);
#pragma unroll
    for (int i = 0; i < K; ++i) out[i] = float(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < K; ++i) out[i] = i < valid ? float(p[i]) : 0.0f;
  }
}

template <class T, int K>
VITZOO_DEVICE void store_pack(T* p, int64_t valid, const float (&in)[K]) {
  if (valid >= K && fits_pack<T, K>(p)) {
    Pack<T, K> pack;
#pragma unroll
    for (int i = 0; i < K; ++i) pack.values[i] = T(in[i]);
    *reinterpret_cast<Pack<T, K>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < K; ++i)
      if (i < valid) p[i] = T(in[i]);
  }
}

// The element type of a view is known at run time only: one kernel serves every mixture of types, and the
// branch is the same for all threads.
template <int K>
VITZOO_DEVICE void load_row(const View& x, int64_t offset, int64_t valid, float (&out)[K]) {
  switch (x.kind) {
    case Kind::bf16:
      return load_pack<torch::headeronly::BFloat16, K>(
          static_cast<const torch::headeronly::BFloat16*>(x.data) + offset, valid, out);
    case Kind::f16:
      return load_pack<torch::headeronly::Half, K>(
          static_cast<const torch::headeronly::Half*>(x.data) + offset, valid, out);
    default:
      return load_pack<float, K>(static_cast<const float*>(x.data) + offset, valid, out);
  }
}

template <int K>
VITZOO_DEVICE void store_row(const View& x, int64_t offset, int64_t valid, const float (&in)[K]) {
  switch (x.kind) {
    case Kind::bf16:
      return store_pack<torch::headeronly::BFloat16, K>(
          static_cast<torch::headeronly::BFloat16*>(x.data) + offset, valid, in);
    case Kind::f16:
      return store_pack<torch::headeronly::Half, K>(static_cast<torch::headeronly::Half*>(x.data) + offset,
                                                    valid, in);
    default:
      return store_pack<float, K>(static_cast<float*>(x.data) + offset, valid, in);
  }
}

VITZOO_DEVICE float load_one(const View& x, int64_t offset) {
  switch (x.kind) {
    case Kind::bf16:
      return float(static_cast<const torch::headeronly::BFloat16*>(x.data)[offset]);
    case Kind::f16:
      return float(static_cast<const torch::headeronly::Half*>(x.data)[offset]);
    default:
      return static_cast<const float*>(x.data)[offset];
  }
}

VITZOO_DEVICE void store_one(const View& x, int64_t offset, float value) {
  switch (x.kind) {
    case Kind::bf16:
      static_cast<torch::headeronly::BFloat16*>(x.data)[offset] = torch::headeronly::BFloat16(value);
      return;
    case Kind::f16:
      static_cast<torch::headeronly::Half*>(x.data)[offset] = torch::headeronly::Half(value);
      return;
    default:
      static_cast<float*>(x.data)[offset] = value;
  }
}

}  // namespace vitzoo
