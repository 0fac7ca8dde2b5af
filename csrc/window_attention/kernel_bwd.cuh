// The backward pass of window attention on a GPU; see kernel.cuh.
//
// A team takes one head of several windows, one after the other. Per window it goes over the queries, which
// gives dq, the bias and what the softmax needs (maximum, 1 / sum, and delta = sum_j p_ij dp_ij of each
// query), then over the keys, where the scores are computed again with the roles exchanged, which gives dk
// and dv. Nothing of the size of the attention matrix is kept, and no sum is atomic: the gradients of bias
// and padding are partial sums of a team, each element of which belongs to one thread.
#pragma once

#include "kernel.cuh"

namespace vitzoo {

template <int NK>
struct WindowAttentionBackward {
  static constexpr int kMaxThreads = kAttentionMaxThreads, kMinBlocks = NK <= 2 ? 4 : 2;
  static constexpr int kMatrices = 4;  // q, k, v, dout
  static constexpr int kNumbers = 3;   // maximum, 1 / sum, delta
  static constexpr int kPadRows = 3;   // sums of dq, dk, dv of padded tokens, per warp

  using Quad = attention::Quad;
  using Team = attention::Team;
  static constexpr int kRows = attention::kRows;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const WindowAttentionCudaArgs& k) {
    using namespace attention;
    const Team team(exec, k, kMatrices, kNumbers);
    const int head = int(team.index % k.heads);
    const int64_t part = team.index / k.heads, windows = k.batch * k.rows * k.cols;
    float* pads = pad_sums(exec, k, exec.warp());
    for (int i = exec.lane(); i < kPadRows * k.head_dim; i += kWarp) pads[i] = 0.0f;
    for (int64_t i = 0; i < k.windows_per_part; ++i) {
      const int64_t index = part * k.windows_per_part + i;
      const bool exists = part < k.parts && index < windows;
      const Window window = window_at(k, exists ? index : 0);
      block_barrier(exec);  // the window before is done with
      find_tokens(exec, k, team, window);
      block_barrier(exec);
      if (exists) load_matrices(exec, k, team, window.image, head);
      block_barrier(exec);
      if (exists)
        for (int first = team.warp * kRows; first < k.area; first += team.warps * kRows)
          over_queries(exec, k, team, window.image, head, first, i == 0 ? nullptr : k.dbias, part);
      block_barrier(exec);
      if (exists)
        for (int first = team.warp * kRows; first < k.area; first += team.warps * kRows)
          over_keys(exec, k, team, window.image, head, first);
    }
    block_barrier(exec);
    if (k.dpad != nullptr && part < k.parts) write_pad(exec, k, team, head, part);
  }

 private:
  // Sums of the gradients at padded tokens, (3, head_dim) per warp, behind the items.
  template <class Exec>
  VITZOO_DEVICE static float* pad_sums(Exec& exec, const WindowAttentionCudaArgs& k, int warp) {
    const int teams = exec.warps() / k.warps_per_item;
    const int floats = attention::item_floats(k.area, k.head_dim, k.warps_per_item, kMatrices, kNumbers);
    return static_cast<float*>(exec.shared()) + teams * floats + warp * kPadRows * k.head_dim;
  }

  template <class Exec>
  VITZOO_DEVICE static void load_matrices(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                          int64_t image, int head) {
    for (int which = 0; which < 3; ++which)
      attention::load_matrix(exec, k, team, image, which, head, team.matrix(k, which));
    float* dout = team.matrix(k, 3);
    for (int token = team.warp; token < k.area; token += team.warps) {
      const int place = team.place[token];
      for (int c = exec.lane(); c < k.head_dim; c += kWarp)
        dout[token * attention::row_length(k) + c] =
            place < 0
                ? 0.0f
                : load_one(k.dout, attention::token_at(k, k.dout, image, place) + head * k.head_dim + c);
    }
  }

  // Four tokens' rows of a matrix, from `first` on, to the whole warp.
  template <class Exec>
  VITZOO_DEVICE static void share_rows(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                       const float* matrix, int first) {
    exec.sync_warp();  // the rows before were read
    for (int c = exec.lane(); c < k.head_dim; c += kWarp) {
      Quad row;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        row.values[r] = first + r < k.area ? matrix[(first + r) * attention::row_length(k) + c] : 0.0f;
      team.rows[c] = row;
    }
    exec.sync_warp();
  }

  // Stores scale * sum over tokens of the shared weights and `matrix` as dq, dk or dv (`which`) of four
  // tokens.
  template <class Exec>
  VITZOO_DEVICE static void store_sums(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                       int64_t image, int head, int first, int which, const float* matrix,
                                       float scale) {
    float* pads = pad_sums(exec, k, exec.warp()) + which * k.head_dim;
    for (int c = exec.lane(); c < k.head_dim; c += kWarp) {
      const Quad sum = attention::weighted_sum(k, team, matrix, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= k.area) continue;
        const int place = team.place[first + r];
        if (place < 0)
          pads[c] += scale * sum.values[r];
        else
          store_one(k.dqkv,
                    attention::token_at(k, k.dqkv, image, place) + (which * k.heads + head) * k.head_dim + c,
                    scale * sum.values[r]);
      }
    }
  }

  // `add_to` is where the bias' partial sums are if this is not the first window of the part.
  template <class Exec>
  VITZOO_DEVICE static void over_queries(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                         int64_t image, int head, int first, const float* add_to,
                                         int64_t part) {
    using namespace attention;
    float *mosts = team.numbers, *inverses = mosts + k.area, *deltas = inverses + k.area;
    float p[kRows][NK] = {}, ds[kRows][NK] = {};
    share_rows(exec, k, team, team.matrix(k, 0), first);
    products<NK>(exec, k, team.rows, team.matrix(k, 1), p);
    share_rows(exec, k, team, team.matrix(k, 3), first);
    products<NK>(exec, k, team.rows, team.matrix(k, 2), ds);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int query = first + r;
#pragma unroll
      for (int n = 0; n < NK; ++n) p[r][n] = score(k, team, head, query, exec.lane() + n * kWarp, p[r][n]);
      float most, sum, delta = 0.0f;
      exponentiate<NK>(exec, p[r], most, sum);
      const float inverse = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int n = 0; n < NK; ++n) {
        p[r][n] *= inverse;
        delta += p[r][n] * ds[r][n];
      }
      delta = warp_sum(exec, delta);
      if (exec.lane() == 0 && query < k.area) {
        mosts[query] = most;
        inverses[query] = inverse;
        deltas[query] = delta;
      }
#pragma unroll
      for (int n = 0; n < NK; ++n) {
        const int key = exec.lane() + n * kWarp;
        ds[r][n] = p[r][n] * (ds[r][n] - delta);
        if (k.dbias == nullptr || key >= k.area || query >= k.area) continue;
        const int64_t at = ((part * k.heads + head) * k.area + query) * k.area + key;
        k.dbias[at] = add_to == nullptr ? ds[r][n] : add_to[at] + ds[r][n];
      }
    }
    share_weights<NK>(exec, k, team, ds);
    store_sums(exec, k, team, image, head, first, 0, team.matrix(k, 1), k.scale);
  }

  template <class Exec>
  VITZOO_DEVICE static void over_keys(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                      int64_t image, int head, int first) {
    using namespace attention;
    const float *mosts = team.numbers, *inverses = mosts + k.area, *deltas = inverses + k.area;
    float p[kRows][NK] = {}, ds[kRows][NK] = {};
    share_rows(exec, k, team, team.matrix(k, 1), first);
    products<NK>(exec, k, team.rows, team.matrix(k, 0), p);
    share_rows(exec, k, team, team.matrix(k, 2), first);
    products<NK>(exec, k, team.rows, team.matrix(k, 3), ds);
#pragma unroll
    for (int n = 0; n < NK; ++n) {
      const int query = exec.lane() + n * kWarp;
      const int known = query < k.area ? query : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float s = score(k, team, head, query, first + r, p[r][n]);
        p[r][n] = exp2_of(s - mosts[known]) * inverses[known];
        ds[r][n] = p[r][n] * (ds[r][n] - deltas[known]);
      }
    }
    share_weights<NK>(exec, k, team, p);
    store_sums(exec, k, team, image, head, first, 2, team.matrix(k, 3), 1.0f);
    share_weights<NK>(exec, k, team, ds);
    store_sums(exec, k, team, image, head, first, 1, team.matrix(k, 0), k.scale);
  }

  template <class Exec>
  VITZOO_DEVICE static void write_pad(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                      int head, int64_t part) {
    const int channels = k.heads * k.head_dim, first_warp = exec.warp() - team.warp;
    for (int i = team.warp * kWarp + exec.lane(); i < kPadRows * k.head_dim; i += team.warps * kWarp) {
      float sum = 0.0f;
      for (int warp = 0; warp < team.warps; ++warp) sum += pad_sums(exec, k, first_warp + warp)[i];
      const int which = i / k.head_dim, c = i % k.head_dim;
      k.dpad[part * 3 * channels + which * channels + head * k.head_dim + c] = sum;
    }
  }
};

}  // namespace vitzoo
