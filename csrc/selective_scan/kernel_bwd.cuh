// The backward pass of the selective scan on a GPU; see kernel.cuh.
//
// With r_t = exp(step_t A) g_t, where g_t = dL/dh_t = C_t dy_t + r_{t+1}, the gradient runs against the
// sequence as the same kind of affine maps: r_t = a_t r_{t+1} + a_t C_t dy_t. Both scans of a state share one
// barrier. The states before each chunk come from a first sweep where the sequence is longer than a chunk.
#pragma once

#include "kernel.cuh"

namespace vitzoo {
namespace scan {

// Shared memory of the backward pass, see scan_backward_shared.
struct Shared {
  Affine* totals;       // (2, 2, warps)
  float* carries;       // (2, dstate): of the state in the first sweep; zeros after it where there is none
  float* gradients;     // (2, dstate): r at the first token of the chunk after this one
  float *da, *db, *dc;  // (dstate, warps)
  float *dd, *ddelta_bias;  // (warps)

  template <class Exec>
  VITZOO_DEVICE Shared(Exec& exec, int64_t dstate) {
    const int64_t sums = dstate * exec.warps();
    totals = static_cast<Affine*>(exec.shared());
    carries = reinterpret_cast<float*>(totals + 4 * exec.warps());
    gradients = carries + 2 * dstate;
    da = gradients + 2 * dstate;
    db = da + sums;
    dc = db + sums;
    dd = dc + sums;
    ddelta_bias = dd + exec.warps();
  }
};

// What one chunk of one channel holds in registers while its states pass by.
template <int K>
struct Chunk {
  Tokens<K> step, u, dy;
  Tokens<K> y;   // the output before gate and skip
  Tokens<K> gb;  // sum over states of g B
  Tokens<K> qa;  // sum over states of g a h A
};

// Adds one channel's part to the block's partial sums of dB or dC. A thread meets the same tokens for each
// channel.
template <int K>
VITZOO_DEVICE void add_row(float* row, bool first, const Place& at, Tokens<K>& part) {
  if (at.valid <= 0) return;
  if (!first) {
    Tokens<K> sum;
    load_pack<float, K>(row, K, sum.values);
#pragma unroll
    for (int i = 0; i < K; ++i) part[i] += sum[i];
  }
  store_pack<float, K>(row, K, part.values);
}

// Adds the warp's sum over its tokens; only lane 0 writes, always to the same place.
template <int K, class Exec>
VITZOO_DEVICE void add_sum(Exec& exec, float* sum, const Tokens<K>& part) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < K; ++i) total += part[i];
  total = warp_sum(exec, total);
  if (exec.lane() == 0) *sum += total;
}

template <int K, class Exec>
VITZOO_DEVICE void add_matrix(Exec& exec, float* rows, bool constant, float* sums, bool first,
                              const Place& at, int64_t n, Tokens<K>& part) {
  if (constant)
    add_sum<K>(exec, sums + n * exec.warps() + exec.warp(), part);
  else
    add_row<K>(rows, first, at, part);
}

// One state of one chunk: both scans, then every gradient that the state takes part in.
template <int K, class Exec>
VITZOO_DEVICE void state_gradients(Exec& exec, const SelectiveScanCudaArgs& k, const Shared& shared,
                                   const Place& at, int64_t part, bool first, int64_t n, float start,
                                   const float* carry, float* next, Chunk<K>& chunk) {
  Affine* totals = shared.totals + (n % 2) * 2 * exec.warps();
  const float rate = k.a[at.channel * k.dstate + n];
  Tokens<K> b, c, decay, drive, h;
#pragma unroll
  for (int i = 0; i < K; ++i) drive[i] = chunk.step[i] * chunk.u[i];
  load_matrix<K>(k, k.b, k.constant_b, at, n, b);
  load_matrix<K>(k, k.c, k.constant_c, at, n, c);
  const Affine up = warp_scan_up(exec, fold<K>(chunk.step, drive, rate * kLog2E, b, decay));
  Affine down;
#pragma unroll
  for (int i = K - 1; i >= 0; --i) down = then(down, Affine{decay[i], decay[i] * c[i] * chunk.dy[i]});
  down = warp_scan_down(exec, down);
  if (exec.lane() == kWarp - 1) totals[exec.warp()] = up;
  if (exec.lane() == 0) totals[exec.warps() + exec.warp()] = down;
  block_barrier(exec);
  const float entering = enter_up(exec, up, totals, start).own;
  const Entered back = enter_down(exec, down, totals + exec.warps(), carry[n]);
  if (exec.thread() == 0) next[n] = back.end;
  float state = entering;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    state = decay[i] * state + drive[i] * b[i];
    h[i] = state;
    chunk.y[i] += c[i] * state;
  }
  Tokens<K> da;
  float r = back.own;
#pragma unroll
  for (int i = K - 1; i >= 0; --i) {
    const float g = c[i] * chunk.dy[i] + r;
    r = decay[i] * g;
    const float q = r * (i > 0 ? h[i > 0 ? i - 1 : 0] : entering);
    da[i] = q * chunk.step[i];
    chunk.qa[i] += q * rate;
    chunk.gb[i] += g * b[i];
    b[i] = g * drive[i];        // from here on dB
    c[i] = chunk.dy[i] * h[i];  // and dC
  }
  add_sum<K>(exec, shared.da + n * exec.warps() + exec.warp(), da);
  const int64_t row = (((at.image * k.parts + part) * k.groups + at.group) * k.dstate + n) * k.row + at.token;
  add_matrix<K>(exec, k.db + row, k.constant_b, shared.db, first, at, n, b);
  add_matrix<K>(exec, k.dc + row, k.constant_c, shared.dc, first, at, n, c);
}

// Reads a chunk's tokens; dy is the gradient of the output before the gate.
template <int K>
VITZOO_DEVICE void load_chunk(const SelectiveScanCudaArgs& k, const Place& at, Chunk<K>& chunk) {
  load_delta<K>(k, at, chunk.step);
  to_step<K>(k, at, chunk.step);
  load<K>(k.u, at, chunk.u);
  load<K>(k.dout, at, chunk.dy);
  Tokens<K> z;
  if (k.z.data != nullptr) load<K>(k.z, at, z);
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (k.z.data != nullptr) chunk.dy[i] *= z[i] * sigmoid_of(z[i]);
    chunk.y[i] = chunk.gb[i] = chunk.qa[i] = 0.0f;
  }
}

// Writes du, ddelta and dz of a chunk and adds to the sums of dD and ddelta_bias.
template <int K, class Exec>
VITZOO_DEVICE void finish_chunk(Exec& exec, const SelectiveScanCudaArgs& k, const Shared& shared,
                                const Place& at, Chunk<K>& chunk) {
  const float skip = k.d == nullptr ? 0.0f : k.d[at.channel];
  if (k.z.data != nullptr) {
    Tokens<K> z, dout;
    load<K>(k.z, at, z);
    load<K>(k.dout, at, dout);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float gate = sigmoid_of(z[i]);
      const float y = k.d == nullptr ? chunk.y[i] : chunk.y[i] + skip * chunk.u[i];
      z[i] = dout[i] * y * gate * (1.0f + z[i] * (1.0f - gate));
    }
    store<K>(k.dz, at, z);
  }
  Tokens<K> du, ddelta, dd;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const float slope = k.delta_softplus ? -expm1_of(-chunk.step[i]) : 1.0f;
    ddelta[i] = (chunk.u[i] * chunk.gb[i] + chunk.qa[i]) * slope;
    ddelta[i] = i < at.valid ? ddelta[i] : 0.0f;
    du[i] = chunk.step[i] * chunk.gb[i];
    if (k.d != nullptr) du[i] += skip * chunk.dy[i];
    dd[i] = chunk.dy[i] * chunk.u[i];
  }
  store<K>(k.du, at, du);
  store<K>(k.ddelta, at, ddelta);
  if (k.dd != nullptr) add_sum<K>(exec, shared.dd + exec.warp(), dd);
  if (k.ddelta_bias != nullptr) add_sum<K>(exec, shared.ddelta_bias + exec.warp(), ddelta);
}

// Writes the state before each chunk to k.starts.
template <int K, class Exec>
VITZOO_DEVICE void first_sweep(Exec& exec, const SelectiveScanCudaArgs& k, const Shared& shared, Place at) {
  float* starts = k.starts + (at.image * k.dim + at.channel) * k.chunks * k.dstate;
  for (int64_t index = 0; index < k.chunks; ++index) {
    const float* carry = shared.carries + (index % 2) * k.dstate;
    float* next = shared.carries + (1 - index % 2) * k.dstate;
    block_barrier(exec);
    for (int64_t n = exec.thread(); n < k.dstate; n += exec.threads())
      starts[index * k.dstate + n] = carry[n];
    if (index + 1 == k.chunks) return;
    at.token = (index * exec.threads() + exec.thread()) * K;
    at.valid = k.seqlen - at.token;
    Tokens<K> step, drive;
    load_delta<K>(k, at, step);
    to_step<K>(k, at, step);
    load<K>(k.u, at, drive);
#pragma unroll
    for (int i = 0; i < K; ++i) drive[i] *= step[i];
    forward_chunk<K>(exec, k, at, step, drive, shared.totals, carry, next,
                     [](int64_t, float, const Tokens<K>&, const Tokens<K>&) {});
  }
}

template <class Exec>
VITZOO_DEVICE void clear_sums(Exec& exec, const SelectiveScanCudaArgs& k, const Shared& shared,
                              int64_t channel) {
  for (int64_t n = exec.thread(); n < k.dstate; n += exec.threads()) {
    shared.carries[n] = 0.0f;
    shared.gradients[n] = k.dlast_state == nullptr ? 0.0f : k.dlast_state[channel * k.dstate + n];
    for (int warp = 0; warp < exec.warps(); ++warp) {
      const int64_t i = n * exec.warps() + warp;
      shared.da[i] = shared.db[i] = shared.dc[i] = 0.0f;
    }
  }
  if (exec.lane() == 0) shared.dd[exec.warp()] = shared.ddelta_bias[exec.warp()] = 0.0f;
}

template <class Exec>
VITZOO_DEVICE float sum_of_warps(Exec& exec, const float* sums) {
  float sum = 0.0f;
  for (int warp = 0; warp < exec.warps(); ++warp) sum += sums[warp];
  return sum;
}

template <class Exec>
VITZOO_DEVICE void write_sums(Exec& exec, const SelectiveScanCudaArgs& k, const Shared& shared,
                              int64_t channel) {
  for (int64_t n = exec.thread(); n < k.dstate; n += exec.threads()) {
    const int64_t i = channel * k.dstate + n, sums = n * exec.warps();
    k.da[i] = sum_of_warps(exec, shared.da + sums);
    if (k.constant_b) k.db[i] = sum_of_warps(exec, shared.db + sums);
    if (k.constant_c) k.dc[i] = sum_of_warps(exec, shared.dc + sums);
  }
  if (exec.thread() != 0) return;
  if (k.dd != nullptr) k.dd[channel] = sum_of_warps(exec, shared.dd);
  if (k.ddelta_bias != nullptr) k.ddelta_bias[channel] = sum_of_warps(exec, shared.ddelta_bias);
}

}  // namespace scan

template <int K>
struct SelectiveScanBackward {
  static constexpr int kMaxThreads = kScanMaxThreads, kMinBlocks = K == 4 ? 4 : 3;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const SelectiveScanCudaArgs& k) {
    using namespace scan;
    const Shared shared(exec, k.dstate);
    const int64_t part = exec.block() % k.parts;
    Place at{exec.block() / k.parts / k.groups, 0, exec.block() / k.parts % k.groups, 0, 0};
    const int64_t first = at.group * k.group_channels + part * k.part_channels;
    const int64_t end = (at.group + 1) * k.group_channels;
    for (at.channel = first; at.channel < first + k.part_channels && at.channel < end; ++at.channel) {
      const int64_t channel = at.image * k.dim + at.channel;
      block_barrier(exec);  // the sums of the channel before were read
      clear_sums(exec, k, shared, channel);
      if (k.starts != nullptr) first_sweep<K>(exec, k, shared, at);
      int parity = 0;
      for (int64_t index = k.chunks - 1; index >= 0; --index, parity ^= 1) {
        at.token = (index * exec.threads() + exec.thread()) * K;
        at.valid = k.seqlen - at.token;
        block_barrier(exec);  // gradients, starts
        const float* starts =
            k.starts == nullptr ? shared.carries : k.starts + (channel * k.chunks + index) * k.dstate;
        Chunk<K> chunk;
        load_chunk<K>(k, at, chunk);
        for (int64_t n = 0; n < k.dstate; ++n)
          state_gradients<K>(exec, k, shared, at, part, at.channel == first, n, starts[n],
                             shared.gradients + parity * k.dstate, shared.gradients + (parity ^ 1) * k.dstate,
                             chunk);
        finish_chunk<K>(exec, k, shared, at, chunk);
      }
      block_barrier(exec);
      write_sums(exec, k, shared, channel);
    }
  }
};

}  // namespace vitzoo
