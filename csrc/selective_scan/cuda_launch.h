// vitzoo_native::selective_scan_cuda_fwd and _bwd from tensors to kernels; cuda.cu registers them for CUDA
// tensors, cuda_host.cpp for CPU tensors. kernels/selective_scan/cuda.py allocates every output.
#pragma once

#include "../common/launch.h"
#include "kernel.cuh"
#include "kernel_bwd.cuh"

namespace vitzoo {

using Optional = std::optional<Tensor>;

template <class Launch>
SelectiveScanCudaArgs scan_inputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                  const Tensor& c, const Optional& d, const Optional& z,
                                  const Optional& delta_bias, bool delta_softplus, int64_t tokens,
                                  int64_t threads) {
  SelectiveScanCudaArgs k{};
  STD_TORCH_CHECK(u.dim() == 3 && a.dim() == 2, "u must be (B, D, L) and A (D, N)");
  STD_TORCH_CHECK(tokens == 4 || tokens == 8, "a thread takes 4 or 8 tokens, not ", tokens);
  STD_TORCH_CHECK(threads > 0 && threads % kWarp == 0 && threads <= kScanMaxThreads,
                  "a block has 32 to 128 threads in whole warps, not ", threads);
  k.batch = u.size(0);
  k.dim = u.size(1);
  k.seqlen = u.size(2);
  k.dstate = a.size(1);
  k.row = (k.seqlen + 7) / 8 * 8;
  k.chunks = (k.seqlen + tokens * threads - 1) / (tokens * threads);
  k.constant_b = b.dim() == 2;
  k.constant_c = c.dim() == 2;
  k.groups = !k.constant_b ? b.size(1) : !k.constant_c ? c.size(1) : 1;
  STD_TORCH_CHECK(k.groups > 0 && k.dim % k.groups == 0, "groups do not divide the channels");
  k.group_channels = k.dim / k.groups;
  k.delta_softplus = delta_softplus;
  const int64_t states = k.dim * k.dstate, matrix = k.batch * k.groups * k.dstate * k.row;
  k.u = rows<Launch>(u, "u", k.batch, k.dim, k.seqlen);
  k.delta = rows<Launch>(delta, "delta", k.batch, k.dim, k.seqlen);
  k.z = rows<Launch>(z, "z", k.batch, k.dim, k.seqlen);
  k.a = floats<Launch>(a, "A", states);
  k.b = floats<Launch>(b, "B", k.constant_b ? states : matrix);
  k.c = floats<Launch>(c, "C", k.constant_c ? states : matrix);
  k.d = floats<Launch>(d, "D", k.dim);
  k.delta_bias = floats<Launch>(delta_bias, "delta_bias", k.dim);
  return k;
}

template <class Launch>
void selective_scan_cuda_fwd(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Optional d, Optional z,
                             Optional delta_bias, bool delta_softplus, int64_t tokens, int64_t threads,
                             Tensor out, Tensor last_state) {
  SelectiveScanCudaArgs k =
      scan_inputs<Launch>(u, delta, a, b, c, d, z, delta_bias, delta_softplus, tokens, threads);
  k.out = rows<Launch>(out, "out", k.batch, k.dim, k.seqlen);
  k.last_state = floats<Launch>(last_state, "last_state", k.batch * k.dim * k.dstate);
  const Grid grid{k.batch * k.dim, int(threads), scan_forward_shared(int(threads), k.dstate)};
  if (tokens == 4)
    Launch::template run<SelectiveScanForward<4>>(u, grid, k);
  else
    Launch::template run<SelectiveScanForward<8>>(u, grid, k);
}

template <class Launch>
void selective_scan_cuda_bwd(Tensor dout, Optional dlast_state, Tensor u, Tensor delta, Tensor a, Tensor b,
                             Tensor c, Optional d, Optional z, Optional delta_bias, bool delta_softplus,
                             int64_t tokens, int64_t threads, int64_t part_channels, Optional starts,
                             Tensor du, Tensor ddelta, Tensor da, Tensor db, Tensor dc, Optional dd,
                             Optional dz, Optional ddelta_bias) {
  SelectiveScanCudaArgs k =
      scan_inputs<Launch>(u, delta, a, b, c, d, z, delta_bias, delta_softplus, tokens, threads);
  STD_TORCH_CHECK(part_channels > 0, "part_channels is ", part_channels, ", not positive");
  STD_TORCH_CHECK(starts.has_value() == (k.chunks > 1), "starts is wanted exactly for two chunks or more");
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  k.part_channels = part_channels;
  k.parts = (k.group_channels + part_channels - 1) / part_channels;
  const int64_t states = k.batch * k.dim * k.dstate;
  const int64_t matrix = k.batch * k.parts * k.groups * k.dstate * k.row;
  k.dout = rows<Launch>(dout, "dout", k.batch, k.dim, k.seqlen);
  k.du = rows<Launch>(du, "du", k.batch, k.dim, k.seqlen);
  k.ddelta = rows<Launch>(ddelta, "ddelta", k.batch, k.dim, k.seqlen);
  k.dz = rows<Launch>(dz, "dz", k.batch, k.dim, k.seqlen);
  k.dlast_state = floats<Launch>(dlast_state, "dlast_state", states);
  k.starts = floats<Launch>(starts, "starts", states * k.chunks);
  k.da = floats<Launch>(da, "dA", states);
  k.db = floats<Launch>(db, "dB", k.constant_b ? states : matrix);
  k.dc = floats<Launch>(dc, "dC", k.constant_c ? states : matrix);
  k.dd = floats<Launch>(dd, "dD", k.batch * k.dim);
  k.ddelta_bias = floats<Launch>(ddelta_bias, "ddelta_bias", k.batch * k.dim);
  const Grid grid{k.batch * k.groups * k.parts, int(threads), scan_backward_shared(int(threads), k.dstate)};
  if (tokens == 4)
    Launch::template run<SelectiveScanBackward<4>>(u, grid, k);
  else
    Launch::template run<SelectiveScanBackward<8>>(u, grid, k);
}

}  // namespace vitzoo
