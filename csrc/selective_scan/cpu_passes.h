// The kernels of one instruction set as cpu.cpp and routed.cpp call them.
#pragma once

#include "cpu_backward.h"
#include "cpu_divided.h"
#include "cpu_divided_routes.h"
#include "cpu_forward.h"
#include "cpu_routed.h"

namespace {

template <class T>
void forward(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.constant_b) {
    k.constant_c ? forward_pass<T, true, true>(k, begin, end, scratch)
                 : forward_pass<T, true, false>(k, begin, end, scratch);
  } else {
    k.constant_c ? forward_pass<T, false, true>(k, begin, end, scratch)
                 : forward_pass<T, false, false>(k, begin, end, scratch);
  }
}

template <class T>
void backward(const SelectiveScanArgs& k, int64_t begin, int64_t end, void* scratch) {
  if (k.constant_b) {
    k.constant_c ? backward_pass<T, true, true>(k, begin, end, scratch)
                 : backward_pass<T, true, false>(k, begin, end, scratch);
  } else {
    k.constant_c ? backward_pass<T, false, true>(k, begin, end, scratch)
                 : backward_pass<T, false, false>(k, begin, end, scratch);
  }
}

int64_t exponentials(int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t tokens = 64, states = 16;
  Vec<float>*const s = static_cast<Vec<float>*>(scratch), *const rate = s + tokens,
                   *const out = rate + states;
  for (int64_t t = 0; t < tokens; ++t) {
    s[t] = broadcast<float>(1e-3f * float(t));
  }
  for (int64_t n = 0; n < states; ++n) {
    rate[n] = broadcast<float>(-float(n + 1));
  }
  for (int64_t item = begin; item < end; ++item) {
    for (int64_t n = 0; n < states; ++n) {
      const Vec<float> r = rate[n];
      for (int64_t t = 0; t < tokens; ++t) {
        out[t] = exp2_product<float, false>(s[t], r);
      }
      asm volatile("" : : "r"(out) : "memory");  // each row is wanted
    }
  }
  return tokens * states * Simd<float>::W;
}

constexpr vitzoo::SelectiveScanKernels kKernels = {
    forward<float>,        forward<double>,        backward<float>,        backward<double>,
    routed_forward<float>, routed_forward<double>, routed_backward<float>, routed_backward<double>,
    kDivided<float>,       kDivided<double>,       kDividedRoutes<float>,  kDividedRoutes<double>,
    exponentials};

}  // namespace
