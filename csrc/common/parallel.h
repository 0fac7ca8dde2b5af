// Work items over all cores.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <memory>
#include <new>

namespace vitzoo {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// Calls f(begin, end, scratch) for pieces of [0, items), each with `bytes` of its own, aligned to 64.
template <class F>
void parallel_with_scratch(int64_t items, size_t bytes, const F& f) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, FreeAligned> scratch(::operator new(bytes, std::align_val_t(64)));
    f(begin, end, scratch.get());
  });
}

}  // namespace vitzoo
