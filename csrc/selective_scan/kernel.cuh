// The selective scan on a GPU. A block takes one channel of one image (backward: several, one after the
// other) and the sequence in chunks of threads * K tokens, K consecutive ones a thread. Per state the
// recurrence of a chunk is a block-wide scan of affine maps: each thread folds its tokens into one map, warps
// scan by shuffles, and the state carried from chunk to chunk sits in shared memory. No atomics: results do
// not depend on timing.
#pragma once

#include "../common/numeric.cuh"
#include "../common/scan.cuh"
#include "cuda_args.h"

namespace vitzoo {

constexpr int kScanMaxThreads = 128;

// Shared memory of a block, in floats: totals (2 parities, 2 directions, warps), carries (2 parities, states)
// of the state and of its gradient, sums (3 matrices, states, warps), scalars (2, warps).
inline size_t scan_forward_shared(int threads, int64_t dstate) {
  return sizeof(float) * (8 * size_t(threads / kWarp) + 2 * size_t(dstate));
}
inline size_t scan_backward_shared(int threads, int64_t dstate) {
  const size_t warps = size_t(threads / kWarp);
  return sizeof(float) * (8 * warps + 4 * size_t(dstate) + 3 * warps * size_t(dstate) + 2 * warps);
}

namespace scan {

template <int K>
struct Tokens {
  float values[K];

  VITZOO_DEVICE float& operator[](int i) { return values[i]; }
  VITZOO_DEVICE float operator[](int i) const { return values[i]; }
};

// Where a block works: its channel's rows and this thread's tokens.
struct Place {
  int64_t image, channel, group;
  int64_t token;  // the thread's first token
  int64_t valid;  // of its K tokens, how many exist; may be negative or above K
};

template <int K>
VITZOO_DEVICE void load(const View& x, const Place& at, Tokens<K>& out) {
  load_row<K>(x, at.image * x.batch + at.channel * x.channel + at.token, at.valid, out.values);
}

template <int K>
VITZOO_DEVICE void store(const View& x, const Place& at, const Tokens<K>& in) {
  store_row<K>(x, at.image * x.batch + at.channel * x.channel + at.token, at.valid, in.values);
}

// delta, its bias added: what softplus is applied to.
template <int K>
VITZOO_DEVICE void load_delta(const SelectiveScanCudaArgs& k, const Place& at, Tokens<K>& out) {
  load<K>(k.delta, at, out);
  if (k.delta_bias == nullptr) return;
  const float bias = k.delta_bias[at.channel];
#pragma unroll
  for (int i = 0; i < K; ++i) out[i] += bias;
}

// The step; zero past the end of the sequence, where the state must stay as it is.
template <int K>
VITZOO_DEVICE void to_step(const SelectiveScanCudaArgs& k, const Place& at, Tokens<K>& delta) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const float step = k.delta_softplus ? softplus_of(delta[i]) : delta[i];
    delta[i] = i < at.valid ? step : 0.0f;
  }
}

VITZOO_DEVICE int64_t row_of(const SelectiveScanCudaArgs& k, const Place& at, int64_t state) {
  return ((at.image * k.groups + at.group) * k.dstate + state) * k.row + at.token;
}

template <int K>
VITZOO_DEVICE void load_matrix(const SelectiveScanCudaArgs& k, const float* matrix, bool constant,
                               const Place& at, int64_t state, Tokens<K>& out) {
  if (constant) {
    const float value = matrix[at.channel * k.dstate + state];
#pragma unroll
    for (int i = 0; i < K; ++i) out[i] = value;
  } else {
    load_pack<float, K>(matrix + row_of(k, at, state), at.valid > 0 ? K : 0, out.values);
  }
}

// A thread's decays exp(step A), and its tokens folded into one map.
template <int K>
VITZOO_DEVICE Affine fold(const Tokens<K>& step, const Tokens<K>& drive, float rate, const Tokens<K>& b,
                          Tokens<K>& decay) {
  Affine map;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    decay[i] = exp2_of(step[i] * rate);
    map = then(map, Affine{decay[i], drive[i] * b[i]});
  }
  return map;
}

// Runs the state over one chunk for every state n: `use(n, entering state, decay, b)` per thread. `carry`
// holds the states at both ends of the chunk: read at one parity, written at the other.
template <int K, class Exec, class Use>
VITZOO_DEVICE void forward_chunk(Exec& exec, const SelectiveScanCudaArgs& k, const Place& at,
                                 const Tokens<K>& step, const Tokens<K>& drive, Affine* totals,
                                 const float* carry, float* next, Use&& use) {
  for (int64_t n = 0; n < k.dstate; ++n) {
    Affine* totals_n = totals + (n % 2) * 2 * exec.warps();
    Tokens<K> b, decay;
    load_matrix<K>(k, k.b, k.constant_b, at, n, b);
    const Affine map = fold<K>(step, drive, k.a[at.channel * k.dstate + n] * kLog2E, b, decay);
    const Affine inclusive = warp_scan_up(exec, map);
    if (exec.lane() == kWarp - 1) totals_n[exec.warp()] = inclusive;
    block_barrier(exec);
    const Entered entered = enter_up(exec, inclusive, totals_n, carry[n]);
    if (exec.thread() == 0) next[n] = entered.end;
    use(n, entered.own, decay, b);
  }
}

}  // namespace scan

template <int K>
struct SelectiveScanForward {
  static constexpr int kMaxThreads = kScanMaxThreads, kMinBlocks = 4;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const SelectiveScanCudaArgs& k) {
    using namespace scan;
    Affine* totals = static_cast<Affine*>(exec.shared());
    float* carries = reinterpret_cast<float*>(totals + 4 * exec.warps());
    Place at{exec.block() / k.dim, exec.block() % k.dim, 0, 0, 0};
    at.group = at.channel / k.group_channels;
    for (int64_t n = exec.thread(); n < k.dstate; n += exec.threads()) carries[n] = 0.0f;
    int parity = 0;
    for (int64_t start = 0; start < k.seqlen; start += int64_t(exec.threads()) * K, parity ^= 1) {
      at.token = start + int64_t(exec.thread()) * K;
      at.valid = k.seqlen - at.token;
      block_barrier(exec);  // carries
      Tokens<K> step, drive, y;
      load_delta<K>(k, at, step);
      to_step<K>(k, at, step);
      load<K>(k.u, at, drive);
      const float skip = k.d == nullptr ? 0.0f : k.d[at.channel];
#pragma unroll
      for (int i = 0; i < K; ++i) {
        y[i] = k.d == nullptr ? 0.0f : skip * drive[i];
        drive[i] *= step[i];
      }
      forward_chunk<K>(exec, k, at, step, drive, totals, carries + parity * k.dstate,
                       carries + (parity ^ 1) * k.dstate,
                       [&](int64_t n, float h, const Tokens<K>& decay, const Tokens<K>& b) {
                         Tokens<K> c;
                         load_matrix<K>(k, k.c, k.constant_c, at, n, c);
#pragma unroll
                         for (int i = 0; i < K; ++i) {
                           h = decay[i] * h + drive[i] * b[i];
                           y[i] += c[i] * h;
                         }
                       });
      if (k.z.data != nullptr) {
        Tokens<K> z;
        load<K>(k.z, at, z);
#pragma unroll
        for (int i = 0; i < K; ++i) y[i] *= z[i] * sigmoid_of(z[i]);
      }
      store<K>(k.out, at, y);
    }
    block_barrier(exec);
    for (int64_t n = exec.thread(); n < k.dstate; n += exec.threads())
      k.last_state[exec.block() * k.dstate + n] = carries[parity * k.dstate + n];
  }
};

}  // namespace vitzoo
