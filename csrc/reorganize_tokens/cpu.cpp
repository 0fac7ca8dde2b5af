// vitzoo_native::reorganize_tokens_fwd and reorganize_tokens_bwd on the CPU. kernels/reorganize_tokens/cpu.py
// allocates every output and brings everything to contiguous form; shapes are in cpu_args.h.

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "../common/isa.h"
#include "cpu_args.h"

namespace vitzoo {
namespace {

// The `keep` best of a row of scores by falling score, NaN first as torch sorts it, the lower of equals
// first.
template <class T>
void choose(const T* scores, int64_t count, int64_t keep, int64_t* indices, int64_t* place) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::partial_sort(order.begin(), order.begin() + keep, order.end(), [&](int64_t a, int64_t b) {
    const T x = scores[a], y = scores[b];
    if (std::isnan(x) || std::isnan(y)) {
      return std::isnan(x) != std::isnan(y) ? std::isnan(x) : a < b;
    }
    return x != y ? x > y : a < b;
  });
  std::copy(order.begin(), order.begin() + keep, indices);
  std::fill(place, place + count, int64_t(-1));
  for (int64_t i = 0; i < keep; ++i) {
    place[order[static_cast<size_t>(i)]] = i;
  }
}

ReorganizeArgs inputs(const Tensor& x, const Tensor& scores, const Tensor& tokens, int64_t keep, bool fuse) {
  ReorganizeArgs k{};
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu() && x.is_contiguous(),
                  "x is not a contiguous (B, L, C) on the CPU");
  k.batch = x.size(0);
  k.length = x.size(1);
  k.channels = x.size(2);
  k.keep = keep;
  STD_TORCH_CHECK(keep >= 1 && keep < k.length, "keep ", keep, " is not in 1 .. ", k.length - 1);
  k.fuse = fuse && keep < k.length - 1;
  k.kind = kind_of(x, "x");
  k.x = x.data_ptr();
  k.scores = pointer_of(scores, "scores", k.batch * (k.length - 1), k.kind == Kind::f64);
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.is_contiguous() && kind_of(tokens, "tokens") == k.kind &&
                      tokens.numel() == k.batch * (1 + keep + k.fuse) * k.channels,
                  "tokens do not fit x");
  k.tokens = tokens.data_ptr();
  return k;
}

int64_t* integers(const Tensor& x, const char* name, int64_t numel) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Long && x.numel() == numel, name,
      " is not a contiguous int64 tensor of ", numel, " on the CPU");
  return static_cast<int64_t*>(x.data_ptr());
}

template <class F>
void for_images(const ReorganizeArgs& k, const F& f) {
  torch::stable::parallel_for(0, k.batch, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[static_cast<size_t>(k.channels)]);
    f(begin, end, scratch.get());
  });
}

const ReorganizeKernels& kernels() {
  return select(reorganize_tokens_baseline, reorganize_tokens_avx2, reorganize_tokens_avx512);
}

void reorganize_tokens_fwd_cpu(Tensor x, Tensor scores, int64_t keep, bool fuse, Tensor tokens,
                               Tensor indices) {
  ReorganizeArgs k = inputs(x, scores, tokens, keep, fuse);
  const int64_t count = k.length - 1;
  int64_t* const out = integers(indices, "indices", k.batch * keep);
  std::vector<int64_t> places(static_cast<size_t>(k.batch * count));
  k.place = places.data();
  const bool wide = k.kind == Kind::f64;
  const ReorganizePass pass = wide ? kernels().forward_f64 : kernels().forward_f32;
  for_images(k, [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t* const place = places.data() + b * count;
      if (wide) {
        choose(static_cast<const double*>(k.scores) + b * count, count, keep, out + b * keep, place);
      } else {
        choose(static_cast<const float*>(k.scores) + b * count, count, keep, out + b * keep, place);
      }
    }
    pass(k, begin, end, scratch);
  });
}

void reorganize_tokens_bwd_cpu(Tensor dtokens, Tensor indices, Tensor x, Tensor scores, int64_t keep,
                               bool fuse, Tensor dx, Tensor dscores) {
  ReorganizeArgs k = inputs(x, scores, dtokens, keep, fuse);
  const int64_t count = k.length - 1;
  const int64_t* const chosen = integers(indices, "indices", k.batch * keep);
  std::vector<int64_t> places(static_cast<size_t>(k.batch * count), int64_t(-1));
  for (int64_t i = 0; i < k.batch * keep; ++i) {
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < count, "index ", chosen[i], " is not in 0 .. ", count - 1);
    places[static_cast<size_t>(i / keep * count + chosen[i])] = i % keep;
  }
  k.place = places.data();
  STD_TORCH_CHECK(dx.is_cpu() && dx.is_contiguous() && kind_of(dx, "dx") == k.kind && dx.numel() == x.numel(),
                  "dx does not fit x");
  k.dx = dx.data_ptr();
  k.dscores = pointer_of(dscores, "dscores", k.batch * count, k.kind == Kind::f64);
  const ReorganizePass pass = k.kind == Kind::f64 ? kernels().backward_f64 : kernels().backward_f32;
  for_images(k, [&](int64_t begin, int64_t end, void* scratch) { pass(k, begin, end, scratch); });
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "reorganize_tokens_fwd(Tensor x, Tensor scores, int keep, bool fuse, Tensor(a!) tokens, "
      "Tensor(b!) indices) -> ()");
  m.def(
      "reorganize_tokens_bwd(Tensor dtokens, Tensor indices, Tensor x, Tensor scores, int keep, bool fuse, "
      "Tensor(a!) dx, Tensor(b!) dscores) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("reorganize_tokens_fwd", TORCH_BOX(&vitzoo::reorganize_tokens_fwd_cpu));
  m.impl("reorganize_tokens_bwd", TORCH_BOX(&vitzoo::reorganize_tokens_bwd_cpu));
}
