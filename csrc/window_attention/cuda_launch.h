// vitzoo_native::window_attention_cuda_fwd and _bwd from tensors to kernels; cuda.cu registers them for CUDA
// tensors, cuda_host.cpp for CPU tensors. kernels/window_attention/cuda.py allocates every output.
#pragma once

#include "../common/launch.h"
#include "kernel.cuh"
#include "kernel_bwd.cuh"

namespace vitzoo {

// A (batch, height, width, channels) map, contiguous along the channels.
template <class Launch>
View map_of(const Tensor& x, const char* name, const WindowAttentionCudaArgs& k, int64_t channels) {
  Launch::check(x, name);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == k.batch && x.size(1) == k.height && x.size(2) == k.width &&
                      x.size(3) == channels,
                  name, " does not have the shape (", k.batch, ", ", k.height, ", ", k.width, ", ", channels,
                  ")");
  STD_TORCH_CHECK(channels == 1 || x.stride(3) == 1, name, " is not contiguous along the channels");
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
WindowAttentionCudaArgs attention_inputs(const Tensor& qkv, int64_t heads, int64_t window_h, int64_t window_w,
                                         int64_t shift_h, int64_t shift_w, const std::optional<Tensor>& bias,
                                         double scale, const std::optional<Tensor>& pad, bool roll_first,
                                         int64_t warps_per_item) {
  WindowAttentionCudaArgs k{};
  STD_TORCH_CHECK(qkv.dim() == 4 && heads > 0 && qkv.size(3) % (3 * heads) == 0,
                  "qkv must be (B, H, W, 3*C) with heads that divide C");
  STD_TORCH_CHECK(window_h > 0 && window_w > 0 && shift_h >= 0 && shift_h < window_h && shift_w >= 0 &&
                      shift_w < window_w,
                  "the window must be positive and larger than the shift");
  STD_TORCH_CHECK(warps_per_item == 1 || warps_per_item == 2 || warps_per_item == 4,
                  "1, 2 or 4 warps share an item, not ", warps_per_item);
  k.batch = qkv.size(0);
  k.height = int(qkv.size(1));
  k.width = int(qkv.size(2));
  k.heads = int(heads);
  k.head_dim = int(qkv.size(3) / (3 * heads));
  k.window_h = int(window_h);
  k.window_w = int(window_w);
  k.shift_h = int(shift_h);
  k.shift_w = int(shift_w);
  k.rows = (k.height + k.window_h - 1) / k.window_h;
  k.cols = (k.width + k.window_w - 1) / k.window_w;
  k.area = k.window_h * k.window_w;
  k.roll_first = roll_first;
  k.scale = float(scale);
  k.warps_per_item = int(warps_per_item);
  k.qkv = map_of<Launch>(qkv, "qkv", k, qkv.size(3));
  k.bias = floats<Launch>(bias, "attn_bias", int64_t(k.heads) * k.area * k.area);
  k.pad = floats<Launch>(pad, "pad_qkv", qkv.size(3));
  return k;
}

// Runs Kernel<NK> with the least NK that holds the window.
template <class Launch, template <int> class Kernel>
void run_attention(const Tensor& like, const WindowAttentionCudaArgs& k, int64_t items, int extra_per_warp) {
  const int warps = kAttentionMaxThreads / kWarp, teams = warps / k.warps_per_item;
  const int floats =
      attention::item_floats(k.area, k.head_dim, k.warps_per_item, Kernel<1>::kMatrices, Kernel<1>::kNumbers);
  const Grid grid{(items + teams - 1) / teams, kAttentionMaxThreads,
                  sizeof(float) * size_t(teams * floats + warps * extra_per_warp)};
  if (k.area <= 1 * kWarp) return Launch::template run<Kernel<1>>(like, grid, k);
  if (k.area <= 2 * kWarp) return Launch::template run<Kernel<2>>(like, grid, k);
  if (k.area <= 5 * kWarp) return Launch::template run<Kernel<5>>(like, grid, k);
  STD_TORCH_CHECK(k.area <= 8 * kWarp, "a window of ", k.area, " tokens is larger than 256");
  Launch::template run<Kernel<8>>(like, grid, k);
}

template <class Launch>
void window_attention_cuda_fwd(Tensor qkv, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
                               int64_t shift_w, std::optional<Tensor> bias, double scale,
                               std::optional<Tensor> pad, bool roll_first, int64_t warps_per_item,
                               Tensor out) {
  WindowAttentionCudaArgs k = attention_inputs<Launch>(qkv, heads, window_h, window_w, shift_h, shift_w, bias,
                                                       scale, pad, roll_first, warps_per_item);
  k.out = map_of<Launch>(out, "out", k, qkv.size(3) / 3);
  run_attention<Launch, WindowAttentionForward>(qkv, k, k.batch * k.rows * k.cols * k.heads, 0);
}

template <class Launch>
void window_attention_cuda_bwd(Tensor dout, Tensor qkv, int64_t heads, int64_t window_h, int64_t window_w,
                               int64_t shift_h, int64_t shift_w, std::optional<Tensor> bias, double scale,
                               std::optional<Tensor> pad, bool roll_first, int64_t warps_per_item,
                               int64_t windows_per_part, Tensor dqkv, std::optional<Tensor> dbias,
                               std::optional<Tensor> dpad) {
  WindowAttentionCudaArgs k = attention_inputs<Launch>(qkv, heads, window_h, window_w, shift_h, shift_w, bias,
                                                       scale, pad, roll_first, warps_per_item);
  STD_TORCH_CHECK(windows_per_part > 0, "windows_per_part is ", windows_per_part, ", not positive");
  k.windows_per_part = windows_per_part;
  k.parts = (k.batch * k.rows * k.cols + windows_per_part - 1) / windows_per_part;
  k.dout = map_of<Launch>(dout, "dout", k, qkv.size(3) / 3);
  k.dqkv = map_of<Launch>(dqkv, "dqkv", k, qkv.size(3));
  k.dbias = floats<Launch>(dbias, "dbias", k.parts * k.heads * k.area * k.area);
  k.dpad = floats<Launch>(dpad, "dpad", k.parts * qkv.size(3));
  run_attention<Launch, WindowAttentionBackward>(qkv, k, k.parts * k.heads,
                                                 WindowAttentionBackward<1>::kPadRows * k.head_dim);
}

}  // namespace vitzoo
