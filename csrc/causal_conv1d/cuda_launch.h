// vitzoo_native::causal_conv1d_cuda_fwd and _bwd from tensors to kernels; cuda.cu registers them for CUDA
// tensors, cuda_host.cpp for CPU tensors. kernels/causal_conv1d/cuda.py allocates every output.
#pragma once

#include "../common/launch.h"
#include "kernel.cuh"

namespace vitzoo {

template <class Launch>
CausalConv1dCudaArgs conv_inputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& initial, bool silu, bool reverse,
                                 int64_t segment, int64_t threads) {
  CausalConv1dCudaArgs k{};
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, D, L) and weight (D, W)");
  k.batch = x.size(0);
  k.dim = x.size(1);
  k.seqlen = x.size(2);
  k.width = weight.size(1);
  STD_TORCH_CHECK(k.width >= 2 && k.width <= kConvMaxWidth, "W is ", k.width, ", not 2, 3 or 4");
  STD_TORCH_CHECK(segment > 0, "segment is ", segment, ", not positive");
  STD_TORCH_CHECK(threads > 0 && threads % kWarp == 0 && threads <= kConvMaxThreads,
                  "a block has 32 to 128 threads in whole warps, not ", threads);
  k.segment = segment;
  k.segments = (k.seqlen + segment - 1) / segment;
  k.silu = silu;
  k.reverse = reverse;
  k.x = strided<Launch>(x, "x", k.batch, k.dim, k.seqlen);
  k.weight = floats<Launch>(weight, "weight", k.dim * k.width);
  k.bias = floats<Launch>(bias, "bias", k.dim);
  k.initial = strided<Launch>(initial, "initial_states", k.batch, k.dim, k.width - 1);
  return k;
}

inline Grid conv_grid(const CausalConv1dCudaArgs& k, bool columns, int64_t threads, size_t shared_bytes) {
  const int64_t tiles = columns ? (k.dim + threads - 1) / threads : k.dim;
  return {k.batch * k.segments * tiles, int(threads), shared_bytes};
}

template <class Launch>
void causal_conv1d_cuda_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias,
                            std::optional<Tensor> initial, bool silu, bool reverse, bool columns,
                            int64_t segment, int64_t threads, Tensor out, Tensor final) {
  CausalConv1dCudaArgs k = conv_inputs<Launch>(x, weight, bias, initial, silu, reverse, segment, threads);
  k.out = strided<Launch>(out, "out", k.batch, k.dim, k.seqlen);
  k.final = strided<Launch>(final, "final_states", k.batch, k.dim, k.width - 1);
  const Grid grid = conv_grid(k, columns, threads, 0);
  if (columns)
    Launch::template run<CausalConv1dColumns>(x, grid, k);
  else
    Launch::template run<CausalConv1dRows>(x, grid, k);
}

template <class Launch>
void causal_conv1d_cuda_bwd(Tensor dout, std::optional<Tensor> dfinal, Tensor x, Tensor weight,
                            std::optional<Tensor> bias, std::optional<Tensor> initial, bool silu,
                            bool reverse, bool columns, int64_t segment, int64_t threads, Tensor dx,
                            Tensor dweight, std::optional<Tensor> dbias, std::optional<Tensor> dinitial) {
  CausalConv1dCudaArgs k = conv_inputs<Launch>(x, weight, bias, initial, silu, reverse, segment, threads);
  STD_TORCH_CHECK(initial.has_value() == dinitial.has_value(),
                  "dinitial is wanted exactly with initial states");
  k.dout = strided<Launch>(dout, "dout", k.batch, k.dim, k.seqlen);
  k.dx = strided<Launch>(dx, "dx", k.batch, k.dim, k.seqlen);
  k.dfinal = strided<Launch>(dfinal, "dfinal", k.batch, k.dim, k.width - 1);
  k.dinitial = strided<Launch>(dinitial, "dinitial", k.batch, k.dim, k.width - 1);
  k.dweight = floats<Launch>(dweight, "dweight", k.batch * k.segments * k.dim * k.width);
  k.dbias = floats<Launch>(dbias, "dbias", k.batch * k.segments * k.dim);
  if (columns)
    Launch::template run<CausalConv1dColumnsBackward>(x, conv_grid(k, true, threads, 0), k);
  else
    Launch::template run<CausalConv1dRowsBackward>(
        x, conv_grid(k, false, threads, conv_rows_backward_shared(int(threads), segment)), k);
}

}  // namespace vitzoo
