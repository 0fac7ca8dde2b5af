// Runs work items over all cores, each range of them with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace vitzoo {

struct FreeScratch {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// Calls pass(args, begin, end, scratch) on ranges of [0, items).
template <class Pass, class Args>
void run_items(Pass pass, const Args& args, int64_t items, size_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, FreeScratch> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
    pass(args, begin, end, scratch.get());
  });
}

}  // namespace vitzoo
