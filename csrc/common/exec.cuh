// The layer under every CUDA kernel: thread, block, barrier, shared memory, warp shuffle. A kernel has
//   kMaxThreads, kMinBlocks: threads that a block may have, blocks that registers must leave room for
//   template <class Exec> VITZOO_DEVICE static void run(Exec& exec, const Args& args)
// nvcc compiles it over DeviceExec below, the C++ compiler over HostExec (exec_host.h), which runs the
// threads of a block as fibers on the CPU. The tests hold the host form of the very same body to the
// reference.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define VITZOO_DEVICE __device__ __forceinline__
#define VITZOO_BOTH __host__ __device__ inline  // sizes that launcher and kernel agree on
#else
#define VITZOO_DEVICE inline
#define VITZOO_BOTH inline
#endif

namespace vitzoo {

constexpr int kWarp = 32;

// A launch: blocks in one dimension (kernels split the index themselves), threads a block (whole warps), and
// bytes of shared memory a block.
struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

#ifdef __CUDACC__

struct DeviceExec {
  void* memory;

  VITZOO_DEVICE int thread() const { return int(threadIdx.x); }
  VITZOO_DEVICE int threads() const { return int(blockDim.x); }
  VITZOO_DEVICE int lane() const { return thread() % kWarp; }
  VITZOO_DEVICE int warp() const { return thread() / kWarp; }
  VITZOO_DEVICE int warps() const { return threads() / kWarp; }
  VITZOO_DEVICE int64_t block() const { return blockIdx.x; }

  // Every thread of the block must arrive at the same barrier; memory written before is read after.
  VITZOO_DEVICE void barrier() { __syncthreads(); }

  // A barrier of one warp: memory that its lanes wrote before is read after.
  VITZOO_DEVICE void sync_warp() { __syncwarp(); }

  // Every lane of the warp must take part. Where the source lane does not exist, a lane gets its own value.
  VITZOO_DEVICE float shuffle_up(float value, int delta) { return __shfl_up_sync(~0u, value, delta); }
  VITZOO_DEVICE float shuffle_down(float value, int delta) { return __shfl_down_sync(~0u, value, delta); }
  VITZOO_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
  VITZOO_DEVICE float shuffle(float value, int source) { return __shfl_sync(~0u, value, source); }

  // The block's shared memory, 16-byte aligned, undefined at first.
  VITZOO_DEVICE void* shared() { return memory; }
};

template <class Kernel, class Args>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ Args args) {
  extern __shared__ float4 vitzoo_shared[];
  DeviceExec exec{vitzoo_shared};
  Kernel::run(exec, args);
}

#endif

// A barrier of the block at the price of a warp's where there is one warp only.
template <class Exec>
VITZOO_DEVICE void block_barrier(Exec& exec) {
  if (exec.warps() > 1)
    exec.barrier();
  else
    exec.sync_warp();
}

// Sums a value over the warp, in the same order on every lane; every lane gets the sum.
template <class Exec>
VITZOO_DEVICE float warp_sum(Exec& exec, float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += exec.shuffle_xor(value, mask);
  return value;
}

template <class Exec>
VITZOO_DEVICE float warp_max(Exec& exec, float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = exec.shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace vitzoo
