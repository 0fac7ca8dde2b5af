// The causal convolution on a GPU. It moves memory and little else, so neighbouring threads take neighbouring
// elements: tokens where these are contiguous ("rows"), channels where those are ("columns"). The W - 1
// samples before a token are read again, from the first-level cache, or kept in registers where a thread
// walks a channel.
//
// Sample and output s are counted along the walk; s < 0 is an initial state.
#pragma once

#include "../common/numeric.cuh"
#include "cuda_args.h"

namespace vitzoo {

constexpr int kConvMaxWidth = 4;
constexpr int kConvMaxThreads = 128;

// Shared memory of the backward pass over rows, in floats: dy of the segment and the W - 1 outputs after it,
// then per warp the sums of the W taps and of the bias.
inline size_t conv_rows_backward_shared(int threads, int64_t segment) {
  return sizeof(float) *
         (size_t(segment) + kConvMaxWidth - 1 + size_t(threads / kWarp) * (kConvMaxWidth + 1));
}

namespace conv {

struct Place {
  int64_t image, channel;
  int64_t start, end;  // outputs of this block
  int64_t segment;
};

VITZOO_DEVICE int64_t at(const CausalConv1dCudaArgs& k, const View& x, const Place& p, int64_t s) {
  const int64_t token = k.reverse ? k.seqlen - 1 - s : s;
  return p.image * x.batch + p.channel * x.channel + token * x.token;
}

VITZOO_DEVICE int64_t state_at(const View& x, const Place& p, int64_t index) {
  return p.image * x.batch + p.channel * x.channel + index * x.token;
}

VITZOO_DEVICE float sample(const CausalConv1dCudaArgs& k, const Place& p, int64_t s) {
  if (s >= 0) return load_one(k.x, at(k, k.x, p, s));
  return k.initial.data == nullptr ? 0.0f : load_one(k.initial, state_at(k.initial, p, s + k.width - 1));
}

struct Taps {
  float weight[kConvMaxWidth];
  float bias;

  VITZOO_DEVICE Taps(const CausalConv1dCudaArgs& k, int64_t channel) {
#pragma unroll
    for (int i = 0; i < kConvMaxWidth; ++i) weight[i] = i < k.width ? k.weight[channel * k.width + i] : 0.0f;
    bias = k.bias == nullptr ? 0.0f : k.bias[channel];
  }
};

// The W samples that output s sees, oldest first.
VITZOO_DEVICE void load_window(const CausalConv1dCudaArgs& k, const Place& p, int64_t s,
                               float (&window)[kConvMaxWidth]) {
#pragma unroll
  for (int i = 0; i < kConvMaxWidth; ++i) window[i] = i < k.width ? sample(k, p, s - k.width + 1 + i) : 0.0f;
}

// The W - 1 samples before a block's first output, where `slide` expects them.
VITZOO_DEVICE void load_before(const CausalConv1dCudaArgs& k, const Place& p,
                               float (&window)[kConvMaxWidth]) {
  window[0] = 0.0f;
#pragma unroll
  for (int i = 1; i < kConvMaxWidth; ++i)
    window[i] = i < k.width ? sample(k, p, p.start - k.width + i) : 0.0f;
}

VITZOO_DEVICE float convolve(const CausalConv1dCudaArgs& k, const Taps& taps,
                             const float (&window)[kConvMaxWidth]) {
  float y = taps.bias;
#pragma unroll
  for (int i = 0; i < kConvMaxWidth; ++i)
    if (i < k.width) y += taps.weight[i] * window[i];
  return y;
}

// The gradient of the convolution's value at s, before the activation.
VITZOO_DEVICE float gradient(const CausalConv1dCudaArgs& k, const Taps& taps, const Place& p, int64_t s,
                             const float (&window)[kConvMaxWidth]) {
  const float dout = load_one(k.dout, at(k, k.dout, p, s));
  if (!k.silu) return dout;
  const float y = convolve(k, taps, window), gate = sigmoid_of(y);
  return dout * gate * (1.0f + y * (1.0f - gate));
}

// Stores the gradient of sample s, adding what comes through the final states.
VITZOO_DEVICE void store_gradient(const CausalConv1dCudaArgs& k, const Place& p, int64_t s, float dx) {
  const int64_t last = s - k.seqlen + k.width - 1;
  if (last >= 0 && k.dfinal.data != nullptr) dx += load_one(k.dfinal, state_at(k.dfinal, p, last));
  if (s >= 0)
    store_one(k.dx, at(k, k.dx, p, s), dx);
  else if (k.dinitial.data != nullptr)
    store_one(k.dinitial, state_at(k.dinitial, p, s + k.width - 1), dx);
}

VITZOO_DEVICE void store_final(const CausalConv1dCudaArgs& k, const Place& p, int64_t index) {
  store_one(k.final, state_at(k.final, p, index), sample(k, p, k.seqlen - k.width + 1 + index));
}

VITZOO_DEVICE void store_output(const CausalConv1dCudaArgs& k, const Place& p, int64_t s, float y) {
  store_one(k.out, at(k, k.out, p, s), k.silu ? y * sigmoid_of(y) : y);
}

VITZOO_DEVICE void set_segment(const CausalConv1dCudaArgs& k, Place& p, int64_t segment) {
  p.segment = segment;
  p.start = segment * k.segment;
  p.end = p.start + k.segment < k.seqlen ? p.start + k.segment : k.seqlen;
}

// Blocks over rows: one a segment of a channel.
VITZOO_DEVICE Place place_in_row(const CausalConv1dCudaArgs& k, int64_t block) {
  Place p{block / k.segments / k.dim, block / k.segments % k.dim, 0, 0, 0};
  set_segment(k, p, block % k.segments);
  return p;
}

// Blocks over columns: one a segment of as many channels as it has threads; the channel may not exist.
template <class Exec>
VITZOO_DEVICE Place place_in_column(Exec& exec, const CausalConv1dCudaArgs& k) {
  const int64_t tiles = (k.dim + exec.threads() - 1) / exec.threads();
  const int64_t rest = exec.block() / tiles;
  Place p{rest / k.segments, exec.block() % tiles * exec.threads() + exec.thread(), 0, 0, 0};
  set_segment(k, p, rest % k.segments);
  return p;
}

VITZOO_DEVICE void slide(const CausalConv1dCudaArgs& k, float (&window)[kConvMaxWidth], float next) {
#pragma unroll
  for (int i = 0; i + 1 < kConvMaxWidth; ++i) window[i] = i + 1 < k.width ? window[i + 1] : next;
  if (k.width == kConvMaxWidth) window[kConvMaxWidth - 1] = next;
}

}  // namespace conv

struct CausalConv1dRows {
  static constexpr int kMaxThreads = kConvMaxThreads, kMinBlocks = 6;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const CausalConv1dCudaArgs& k) {
    using namespace conv;
    const Place p = place_in_row(k, exec.block());
    const Taps taps(k, p.channel);
#pragma unroll 2
    for (int64_t s = p.start + exec.thread(); s < p.end; s += exec.threads()) {
      float window[kConvMaxWidth];
      load_window(k, p, s, window);
      store_output(k, p, s, convolve(k, taps, window));
    }
    if (p.segment == 0 && exec.thread() < k.width - 1) store_final(k, p, exec.thread());
  }
};

struct CausalConv1dColumns {
  static constexpr int kMaxThreads = kConvMaxThreads, kMinBlocks = 6;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const CausalConv1dCudaArgs& k) {
    using namespace conv;
    const Place p = place_in_column(exec, k);
    if (p.channel >= k.dim) return;
    const Taps taps(k, p.channel);
    float window[kConvMaxWidth];
    load_before(k, p, window);
#pragma unroll 4
    for (int64_t s = p.start; s < p.end; ++s) {
      slide(k, window, sample(k, p, s));
      store_output(k, p, s, convolve(k, taps, window));
    }
    if (p.segment == 0)
      for (int i = 0; i < k.width - 1; ++i) store_final(k, p, i);
  }
};

struct CausalConv1dRowsBackward {
  static constexpr int kMaxThreads = kConvMaxThreads, kMinBlocks = 6;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const CausalConv1dCudaArgs& k) {
    using namespace conv;
    const Place p = place_in_row(k, exec.block());
    const Taps taps(k, p.channel);
    float* dy = static_cast<float*>(exec.shared());
    float* warp_sums = dy + k.segment + kConvMaxWidth - 1;  // (warps, kConvMaxWidth + 1)
    float sums[kConvMaxWidth + 1] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t s = p.start + exec.thread(); s < p.end + k.width - 1; s += exec.threads()) {
      float window[kConvMaxWidth], g = 0.0f;
      if (s < k.seqlen) {
        load_window(k, p, s, window);
        g = gradient(k, taps, p, s, window);
        if (s < p.end) {
#pragma unroll
          for (int i = 0; i < kConvMaxWidth; ++i)
            if (i < k.width) sums[i] += g * window[i];
          sums[kConvMaxWidth] += g;
        }
      }
      dy[s - p.start] = g;
    }
    exec.barrier();
    // samples of this segment, and the initial states before the first
    const int64_t first = p.segment == 0 ? 1 - k.width : p.start;
    for (int64_t s = first + exec.thread(); s < p.end; s += exec.threads()) {
      float dx = 0.0f;
#pragma unroll
      for (int i = 0; i < kConvMaxWidth; ++i) {
        const int64_t output = s + k.width - 1 - i;  // sees sample s through tap i
        if (i < k.width && output >= 0) dx += taps.weight[i] * dy[output - p.start];
      }
      store_gradient(k, p, s, dx);
    }
#pragma unroll
    for (int i = 0; i <= kConvMaxWidth; ++i) {
      const float sum = warp_sum(exec, sums[i]);
      if (exec.lane() == 0) warp_sums[exec.warp() * (kConvMaxWidth + 1) + i] = sum;
    }
    exec.barrier();
    if (exec.thread() > kConvMaxWidth) return;
    float sum = 0.0f;
    for (int warp = 0; warp < exec.warps(); ++warp)
      sum += warp_sums[warp * (kConvMaxWidth + 1) + exec.thread()];
    const int64_t part = (p.image * k.segments + p.segment) * k.dim + p.channel;
    if (exec.thread() < k.width) k.dweight[part * k.width + exec.thread()] = sum;
    if (exec.thread() == kConvMaxWidth && k.dbias != nullptr) k.dbias[part] = sum;
  }
};

struct CausalConv1dColumnsBackward {
  static constexpr int kMaxThreads = kConvMaxThreads, kMinBlocks = 6;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const CausalConv1dCudaArgs& k) {
    using namespace conv;
    const Place p = place_in_column(exec, k);
    if (p.channel >= k.dim) return;
    const Taps taps(k, p.channel);
    float window[kConvMaxWidth];
    float dy[kConvMaxWidth] = {0.0f, 0.0f, 0.0f, 0.0f};  // of outputs s, s - 1, ...
    float sums[kConvMaxWidth + 1] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    load_before(k, p, window);
    const int64_t first = p.segment == 0 ? 1 - k.width : p.start;
#pragma unroll 2
    for (int64_t s = p.start; s < p.end + k.width - 1; ++s) {
      float g = 0.0f;
      if (s < k.seqlen) {
        slide(k, window, sample(k, p, s));
        g = gradient(k, taps, p, s, window);
        if (s < p.end) {
#pragma unroll
          for (int i = 0; i < kConvMaxWidth; ++i)
            if (i < k.width) sums[i] += g * window[i];
          sums[kConvMaxWidth] += g;
        }
      }
#pragma unroll
      for (int i = kConvMaxWidth - 1; i > 0; --i) dy[i] = dy[i - 1];
      dy[0] = g;
      const int64_t done = s - k.width + 1;
      if (done < first) continue;
      float dx = 0.0f;
#pragma unroll
      for (int i = 0; i < kConvMaxWidth; ++i)
        if (i < k.width) dx += taps.weight[i] * dy[i];
      store_gradient(k, p, done, dx);
    }
    const int64_t part = (p.image * k.segments + p.segment) * k.dim + p.channel;
#pragma unroll
    for (int i = 0; i < kConvMaxWidth; ++i)
      if (i < k.width) k.dweight[part * k.width + i] = sums[i];
    if (k.dbias != nullptr) k.dbias[part] = sums[kConvMaxWidth];
  }
};

}  // namespace vitzoo
