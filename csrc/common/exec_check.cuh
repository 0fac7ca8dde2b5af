// Kernels that exercise the execution layer itself, right ones and wrong ones; tests/kernels/test_exec.py
// runs them.
#pragma once

#include "launch.h"

namespace vitzoo {

struct ExecCheckArgs {
  int64_t what;
  float* out;  // (blocks, threads)
};

// The values of `what`. The wrong ones run on the host only.
enum ExecCheck : int64_t {
  kReverse = 0,         // through shared memory and a barrier
  kShuffles = 1,        // all four, packed into one number
  kSums = 2,            // warp sum, then over warps
  kUnwritten = 3,       // shared memory that nobody wrote
  kMissingBarrier = 4,  // kReverse without its barrier
  kEarlyExit = 5,       // a thread leaves before the barrier
  kTwoBarriers = 6,     // odd and even threads at different barriers
  kLoneShuffle = 7,     // half a warp shuffles, half waits at a barrier
  kOverrun = 8,         // a write past the end of shared memory, which the address sanitizer reports
};

struct ExecCheckKernel {
  static constexpr int kMaxThreads = 1024, kMinBlocks = 1;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const ExecCheckArgs& k) {
    float* shared = static_cast<float*>(exec.shared());
    const int thread = exec.thread(), opposite = exec.threads() - 1 - thread;
    float result = 0.0f;
    switch (k.what) {
      case kReverse:
      case kMissingBarrier:
        shared[thread] = float(exec.block() * 1000 + thread);
        if (k.what == kReverse) exec.barrier();
        result = shared[opposite];
        break;
      case kShuffles: {
        const float own = float(exec.lane());
        result = exec.shuffle_up(own, 3) + 100.0f * exec.shuffle_down(own, 5) +
                 10000.0f * exec.shuffle_xor(own, 9) + 1000000.0f * exec.shuffle(own, exec.warp() % 10);
        break;
      }
      case kSums: {
        const float sum = warp_sum(exec, float(thread)), most = warp_max(exec, float(-thread));
        if (exec.lane() == 0) shared[exec.warp()] = sum + 0.5f * most;
        block_barrier(exec);
        for (int warp = 0; warp < exec.warps(); ++warp) result += shared[warp];
        break;
      }
      case kUnwritten:
        result = shared[thread];
        break;
      case kEarlyExit:
        if (thread == 3) return;
        exec.barrier();
        break;
      case kTwoBarriers:
        if (thread % 2 == 0)
          exec.barrier();
        else
          exec.barrier();
        break;
      case kLoneShuffle:
        if (exec.lane() < 16)
          result = exec.shuffle_xor(1.0f, 1);
        else
          exec.barrier();
        break;
      default:
        shared[exec.threads() + thread] = 1.0f;
    }
    k.out[exec.block() * exec.threads() + thread] = result;
  }
};

// out: (blocks, threads)
template <class Launch>
void exec_check(int64_t what, Tensor out) {
  STD_TORCH_CHECK(out.dim() == 2, "out must be (blocks, threads)");
  const ExecCheckArgs args{what, floats<Launch>(out, "out", out.numel())};
  const Grid grid{out.size(0), int(out.size(1)), sizeof(float) * size_t(out.size(1))};
  Launch::template run<ExecCheckKernel>(out, grid, args);
}

}  // namespace vitzoo
