// Tensors to plain data, and launches, for operators that run as CUDA kernels or as their host form. An
// operator's launcher is a template over the two below, so that both take the same way to the kernel.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "exec.cuh"
#ifndef __CUDACC__
#include "exec_host.h"
#endif

namespace vitzoo {

#ifdef __CUDACC__

struct DeviceLaunch {
  static void check(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_cuda(), name, " is not on a CUDA device");
  }

  // On the current stream of the device that `like` is on.
  template <class Kernel, class Args>
  static void run(const Tensor& like, const Grid& grid, const Args& args) {
    if (grid.blocks == 0) return;
    STD_TORCH_CHECK(grid.blocks <= 0x7fffffff, "a launch of ", grid.blocks, " blocks is too large");
    const int32_t device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    if (grid.shared_bytes > 48 << 10)
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          kernel_entry<Kernel, Args>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)));
    kernel_entry<Kernel, Args><<<unsigned(grid.blocks), unsigned(grid.threads), grid.shared_bytes,
                                 static_cast<cudaStream_t>(stream)>>>(args);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

#else

struct HostLaunch {
  static void check(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
  }

  template <class Kernel, class Args>
  static void run(const Tensor&, const Grid& grid, const Args& args) {
    STD_TORCH_CHECK(grid.threads <= Kernel::kMaxThreads, "a block of ", grid.threads,
                    " threads is too large");
    run_on_host(grid, [&](HostExec& exec) { Kernel::run(exec, args); });
  }
};

#endif

// The pointer of a contiguous float32 tensor of `numel` elements.
template <class Launch>
float* floats(const Tensor& x, const char* name, int64_t numel) {
  Launch::check(x, name);
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float, name,
                  " is not contiguous and float32");
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements instead of ", numel);
  return static_cast<float*>(x.data_ptr());
}

template <class Launch>
float* floats(const std::optional<Tensor>& x, const char* name, int64_t numel) {
  return x.has_value() ? floats<Launch>(*x, name, numel) : nullptr;
}

// A (batch, channel, token) tensor of float32, bfloat16 or float16.
template <class Launch>
View strided(const Tensor& x, const char* name, int64_t batch, int64_t dim, int64_t seqlen) {
  Launch::check(x, name);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == dim && x.size(2) == seqlen, name,
                  " does not have the shape (", batch, ", ", dim, ", ", seqlen, ")");
  View view;
  view.kind = kind_of(x, name);
  STD_TORCH_CHECK(view.kind != Kind::f64, name, " is float64, which the CUDA kernels do not take");
  view.data = x.data_ptr();
  view.batch = x.stride(0);
  view.channel = x.stride(1);
  view.token = x.stride(2);
  return view;
}

template <class Launch>
View strided(const std::optional<Tensor>& x, const char* name, int64_t batch, int64_t dim, int64_t seqlen) {
  return x.has_value() ? strided<Launch>(*x, name, batch, dim, seqlen) : View{};
}

// Likewise, contiguous along the tokens.
template <class Launch>
View rows(const Tensor& x, const char* name, int64_t batch, int64_t dim, int64_t seqlen) {
  const View view = strided<Launch>(x, name, batch, dim, seqlen);
  STD_TORCH_CHECK(seqlen <= 1 || view.token == 1, name, " is not contiguous along the tokens");
  return view;
}

template <class Launch>
View rows(const std::optional<Tensor>& x, const char* name, int64_t batch, int64_t dim, int64_t seqlen) {
  return x.has_value() ? rows<Launch>(*x, name, batch, dim, seqlen) : View{};
}

}  // namespace vitzoo
