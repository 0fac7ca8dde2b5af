// vitzoo_native::window_attention_fwd and window_attention_bwd on the CPU. kernels/window_attention/cpu.py
// allocates every output and prepares the bias; shapes are in cpu_args.h.

#include <optional>

#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/scratch.h"
#include "cpu_args.h"

namespace vitzoo {

size_t window_attention_scratch(const WindowAttentionArgs& k, bool backward) {
  const size_t tokens = size_t(k.window_h * k.window_w), d = size_t(k.head_dim);
  const size_t queries = 64, keys = 96, rows = tokens * (d + 16) + 16;  // see common/attention.h
  const size_t tables = 8 * (tokens + queries + 16);
  const size_t work = backward ? 4 * rows + (4 * (d + 16) + 2 * tokens + 8) * queries
                               : 2 * rows + (2 * d + keys + 4) * queries;
  return 8 * (tables + work);
}

namespace {

using Optional = std::optional<Tensor>;

MapView map_of(const Tensor& x, const char* name, const WindowAttentionArgs& k, int64_t channels, Kind kind) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == k.batch && x.size(1) == k.height &&
                      x.size(2) == k.width && x.size(3) == channels,
                  name, " is not a map of the expected shape on the CPU");
  STD_TORCH_CHECK(channels == 1 || x.stride(3) == 1, name, " must be contiguous along the channels");
  STD_TORCH_CHECK(kind_of(x, name) == kind, name, " must have the dtype of qkv");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), kind};
}

WindowAttentionArgs inputs(const Tensor& qkv, int64_t heads, int64_t window_h, int64_t window_w,
                           int64_t shift_h, int64_t shift_w, const Optional& bias, const Optional& bias_t,
                           double scale, const Optional& pad, bool roll_first) {
  WindowAttentionArgs k{};
  STD_TORCH_CHECK(qkv.dim() == 4 && heads > 0 && qkv.size(3) % (3 * heads) == 0,
                  "qkv must be (B, H, W, 3 * heads * head_dim)");
  STD_TORCH_CHECK(window_h > 0 && window_w > 0 && shift_h >= 0 && shift_h < window_h && shift_w >= 0 &&
                      shift_w < window_w,
                  "the shift must be smaller than the window");
  k.batch = qkv.size(0);
  k.height = qkv.size(1);
  k.width = qkv.size(2);
  k.heads = heads;
  k.head_dim = qkv.size(3) / (3 * heads);
  k.window_h = window_h;
  k.window_w = window_w;
  k.shift_h = shift_h;
  k.shift_w = shift_w;
  k.roll_first = roll_first;
  k.scale = scale;
  const Kind kind = kind_of(qkv, "qkv");
  k.qkv = map_of(qkv, "qkv", k, qkv.size(3), kind);
  if (pad.has_value()) {
    STD_TORCH_CHECK(pad->is_cpu() && pad->is_contiguous() && kind_of(*pad, "pad_qkv") == kind &&
                        pad->numel() == qkv.size(3),
                    "pad_qkv must be (3 * C) of the dtype of qkv, contiguous");
    k.pad = pad->data_ptr();
  }
  STD_TORCH_CHECK(bias.has_value() == bias_t.has_value(), "bias_t is wanted exactly when bias is given");
  if (bias.has_value()) {
    const int64_t tokens = window_h * window_w;
    k.bias_ld = (tokens + 15) / 16 * 16;
    k.bias = pointer_of(*bias, "bias", heads * tokens * tokens, kind == Kind::f64);
    k.bias_t = pointer_of(*bias_t, "bias_t", heads * tokens * k.bias_ld, kind == Kind::f64);
  }
  return k;
}

void transpose_bias(const WindowAttentionArgs& k, const WindowAttentionKernels& kernels) {
  if (k.bias != nullptr) {
    run_items(k.qkv.kind == Kind::f64 ? kernels.bias_f64 : kernels.bias_f32, k, k.heads,
              sizeof(void*) * size_t(k.window_h * k.window_w));
  }
}

void window_attention_fwd_cpu(Tensor qkv, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
                              int64_t shift_w, Optional bias, Optional bias_t, double scale, Optional pad,
                              bool roll_first, Tensor out) {
  WindowAttentionArgs k =
      inputs(qkv, heads, window_h, window_w, shift_h, shift_w, bias, bias_t, scale, pad, roll_first);
  k.out = map_of(out, "out", k, heads * k.head_dim, k.qkv.kind);
  const WindowAttentionKernels& kernels =
      select(window_attention_baseline, window_attention_avx2, window_attention_avx512);
  transpose_bias(k, kernels);
  run_items(k.qkv.kind == Kind::f64 ? kernels.forward_f64 : kernels.forward_f32, k,
            k.batch * window_attention_windows(k), window_attention_scratch(k, false));
}

void window_attention_bwd_cpu(Tensor dout, Tensor qkv, int64_t heads, int64_t window_h, int64_t window_w,
                              int64_t shift_h, int64_t shift_w, Optional bias, Optional bias_t, double scale,
                              Optional pad, bool roll_first, int64_t parts, Tensor dqkv, Optional dbias,
                              Optional dpad) {
  WindowAttentionArgs k =
      inputs(qkv, heads, window_h, window_w, shift_h, shift_w, bias, bias_t, scale, pad, roll_first);
  const bool wide = k.qkv.kind == Kind::f64;
  const int64_t channels = heads * k.head_dim;
  k.dout = map_of(dout, "dout", k, channels, k.qkv.kind);
  k.dqkv = map_of(dqkv, "dqkv", k, 3 * channels, k.qkv.kind);
  STD_TORCH_CHECK(parts > 0, "parts must be positive");
  k.parts = parts;
  STD_TORCH_CHECK(bias.has_value() == dbias.has_value() && pad.has_value() == dpad.has_value(),
                  "dbias and dpad are wanted exactly when bias and pad are given");
  k.dbias = pointer_of(dbias, "dbias", parts * heads * window_h * window_w * k.bias_ld, wide);
  k.dpad = pointer_of(dpad, "dpad", parts * 3 * channels, wide);
  const WindowAttentionKernels& kernels =
      select(window_attention_baseline, window_attention_avx2, window_attention_avx512);
  transpose_bias(k, kernels);
  run_items(wide ? kernels.backward_f64 : kernels.backward_f32, k, parts * heads,
            window_attention_scratch(k, true));
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "window_attention_fwd(Tensor qkv, int heads, int window_h, int window_w, int shift_h, int shift_w, "
      "Tensor? bias, Tensor(a!)? bias_t, float scale, Tensor? pad, bool roll_first, Tensor(b!) out) -> ()");
  m.def(
      "window_attention_bwd(Tensor dout, Tensor qkv, int heads, int window_h, int window_w, int shift_h, "
      "int shift_w, Tensor? bias, Tensor(a!)? bias_t, float scale, Tensor? pad, bool roll_first, int parts, "
      "Tensor(b!) dqkv, Tensor(c!)? dbias, Tensor(d!)? dpad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&vitzoo::window_attention_fwd_cpu));
  m.impl("window_attention_bwd", TORCH_BOX(&vitzoo::window_attention_bwd_cpu));
}
