// Window attention on a GPU. One to four warps take one window of one head: its keys and values lie in shared
// memory, read straight from the map, and each warp takes four queries at a time, with the keys over its
// lanes. Small windows share a block. Scores are in units of log 2.
#pragma once

#include "../common/numeric.cuh"
#include "cuda_args.h"

namespace vitzoo {

constexpr int kAttentionMaxThreads = 128;

namespace attention {

constexpr int kRows = 4;  // queries (or keys, in the backward pass) that a warp takes at a time

using Quad = Pack<float, kRows>;

// An odd row length, so that lanes that read one channel of 32 tokens meet 32 banks.
VITZOO_DEVICE int row_length(const WindowAttentionCudaArgs& k) { return k.head_dim | 1; }

// Shared memory of one item, in floats, whole quads: per warp four rows and the weights of four rows; then
// `matrices` of the window's tokens, place and region of each token, `numbers` of each token.
VITZOO_BOTH int item_floats(int area, int head_dim, int warps, int matrices, int numbers) {
  const int per_warp = kRows * (head_dim + area);
  const int floats = warps * per_warp + area * (matrices * (head_dim | 1) + 2 + numbers);
  return (floats + 3) / 4 * 4;
}

// The warps that share an item, as one of them sees it, and their part of shared memory.
struct Team {
  int64_t index;         // of the team in the launch
  int warp, warps;       // within the team
  Quad *rows, *weights;  // of this warp: (head_dim), (area)
  float* matrices;       // (matrices, area, row_length)
  int *place, *region;   // (area)
  float* numbers;        // (numbers, area)

  template <class Exec>
  VITZOO_DEVICE Team(Exec& exec, const WindowAttentionCudaArgs& k, int matrix_count, int number_count) {
    const int team = exec.warp() / k.warps_per_item;
    index = exec.block() * (exec.warps() / k.warps_per_item) + team;
    warp = exec.warp() % k.warps_per_item;
    warps = k.warps_per_item;
    const int floats = item_floats(k.area, k.head_dim, k.warps_per_item, matrix_count, number_count);
    float* memory = static_cast<float*>(exec.shared()) + team * floats;
    const int per_warp = kRows * (k.head_dim + k.area);
    rows = reinterpret_cast<Quad*>(memory + warp * per_warp);
    weights = rows + k.head_dim;
    matrices = memory + warps * per_warp;
    place = reinterpret_cast<int*>(matrices + matrix_count * k.area * row_length(k));
    region = place + k.area;
    numbers = reinterpret_cast<float*>(region + k.area);
  }

  VITZOO_DEVICE float* matrix(const WindowAttentionCudaArgs& k, int i) const {
    return matrices + i * k.area * row_length(k);
  }
};

struct Window {
  int64_t image;
  int row, col;  // of the window among the windows
};

VITZOO_DEVICE Window window_at(const WindowAttentionCudaArgs& k, int64_t index) {
  const int64_t in_image = index % (k.rows * k.cols);
  return {index / (k.rows * k.cols), int(in_image / k.cols), int(in_image % k.cols)};
}

// Where a coordinate of the rolled, padded map comes from; -1 for padding.
VITZOO_DEVICE int source(int place, int size, int padded, int shift, bool roll_first) {
  if (roll_first) return place < size ? (place + shift) % size : -1;
  const int from = (place + shift) % padded;
  return from < size ? from : -1;
}

// Which of the three regions of a shifted axis, between which attention is excluded.
VITZOO_DEVICE int region_of(int place, int padded, int window, int shift) {
  return shift == 0 ? 0 : (place >= padded - window) + (place >= padded - shift);
}

template <class Exec>
VITZOO_DEVICE void find_tokens(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                               const Window& window) {
  const int full_h = k.rows * k.window_h, full_w = k.cols * k.window_w;
  for (int token = team.warp * kWarp + exec.lane(); token < k.area; token += team.warps * kWarp) {
    const int y = window.row * k.window_h + token / k.window_w,
              x = window.col * k.window_w + token % k.window_w;
    const int from_y = source(y, k.height, full_h, k.shift_h, k.roll_first);
    const int from_x = source(x, k.width, full_w, k.shift_w, k.roll_first);
    team.place[token] = from_y < 0 || from_x < 0 ? -1 : from_y * k.width + from_x;
    team.region[token] =
        3 * region_of(y, full_h, k.window_h, k.shift_h) + region_of(x, full_w, k.window_w, k.shift_w);
  }
}

// The offset of a token's first channel in a map.
VITZOO_DEVICE int64_t token_at(const WindowAttentionCudaArgs& k, const View& map, int64_t image, int place) {
  return image * map.batch + int64_t(place / k.width) * map.channel + int64_t(place % k.width) * map.token;
}

// Reads `which` (q, k or v: 0, 1, 2) of a head's token; the padding where place is -1.
VITZOO_DEVICE float load_qkv(const WindowAttentionCudaArgs& k, int64_t image, int place, int which, int head,
                             int channel) {
  const int i = (which * k.heads + head) * k.head_dim + channel;
  if (place < 0) return k.pad == nullptr ? 0.0f : k.pad[i];
  return load_one(k.qkv, token_at(k, k.qkv, image, place) + i);
}

template <class Exec>
VITZOO_DEVICE void load_matrix(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team, int64_t image,
                               int which, int head, float* matrix) {
  for (int token = team.warp; token < k.area; token += team.warps)
    for (int c = exec.lane(); c < k.head_dim; c += kWarp)
      matrix[token * row_length(k) + c] = load_qkv(k, image, team.place[token], which, head, c);
}

// sums[r][n] += the product of row r with token lane + 32 n of the matrix.
template <int NK, class Exec>
VITZOO_DEVICE void products(Exec& exec, const WindowAttentionCudaArgs& k, const Quad* rows,
                            const float* matrix, float (&sums)[kRows][NK]) {
  const float* tokens[NK];
#pragma unroll
  for (int n = 0; n < NK; ++n) {
    const int token = exec.lane() + n * kWarp;
    tokens[n] = matrix + (token < k.area ? token : k.area - 1) * row_length(k);
  }
#pragma unroll 2
  for (int c = 0; c < k.head_dim; ++c) {
    const Quad row = rows[c];
#pragma unroll
    for (int n = 0; n < NK; ++n) {
      const float value = tokens[n][c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r][n] += row.values[r] * value;
    }
  }
}

// Hands four rows of weights, spread over the lanes, to the whole warp.
template <int NK, class Exec>
VITZOO_DEVICE void share_weights(Exec& exec, const WindowAttentionCudaArgs& k, const Team& team,
                                 const float (&weights)[kRows][NK]) {
  exec.sync_warp();  // the weights before were read
#pragma unroll
  for (int n = 0; n < NK; ++n) {
    Quad quad;
#pragma unroll
    for (int r = 0; r < kRows; ++r) quad.values[r] = weights[r][n];
    if (exec.lane() + n * kWarp < k.area) team.weights[exec.lane() + n * kWarp] = quad;
  }
  exec.sync_warp();
}

// sum over tokens of weights[token] matrix[token][channel], for four rows.
VITZOO_DEVICE Quad weighted_sum(const WindowAttentionCudaArgs& k, const Team& team, const float* matrix,
                                int channel) {
  Quad sum{{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll 4
  for (int token = 0; token < k.area; ++token) {
    const Quad weight = team.weights[token];
    const float value = matrix[token * row_length(k) + channel];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum.values[r] += weight.values[r] * value;
  }
  return sum;
}

// Turns products of query and key into scores: scale, bias, exclusion.
VITZOO_DEVICE float score(const WindowAttentionCudaArgs& k, const Team& team, int head, int query, int key,
                          float product) {
  if (key >= k.area || query >= k.area || team.region[query] != team.region[key]) return -INFINITY;
  float value = product * (k.scale * kLog2E);
  if (k.bias != nullptr) value += kLog2E * k.bias[(int64_t(head) * k.area + query) * k.area + key];
  return value;
}

// Softmax over each row: scores become weights before division by the sum. Every lane gets maximum and sum.
template <int NK, class Exec>
VITZOO_DEVICE void exponentiate(Exec& exec, float (&row)[NK], float& most, float& sum) {
  most = row[0];
#pragma unroll
  for (int n = 1; n < NK; ++n) most = row[n] > most ? row[n] : most;
  most = warp_max(exec, most);
  most = most > -INFINITY ? most : 0.0f;  // a row past the window's end
  sum = 0.0f;
#pragma unroll
  for (int n = 0; n < NK; ++n) {
    row[n] = exp2_of(row[n] - most);
    sum += row[n];
  }
  sum = warp_sum(exec, sum);
}

}  // namespace attention

// NK: keys a lane takes, so windows of up to 32 NK tokens.
template <int NK>
struct WindowAttentionForward {
  static constexpr int kMaxThreads = kAttentionMaxThreads, kMinBlocks = NK <= 2 ? 7 : 4;
  static constexpr int kMatrices = 2, kNumbers = 0;

  template <class Exec>
  VITZOO_DEVICE static void run(Exec& exec, const WindowAttentionCudaArgs& k) {
    using namespace attention;
    const Team team(exec, k, kMatrices, kNumbers);
    const int head = int(team.index % k.heads);
    const bool exists = team.index / k.heads < k.batch * k.rows * k.cols;
    const Window window = window_at(k, exists ? team.index / k.heads : 0);
    find_tokens(exec, k, team, window);
    block_barrier(exec);
    if (exists) {
      load_matrix(exec, k, team, window.image, 1, head, team.matrix(k, 0));
      load_matrix(exec, k, team, window.image, 2, head, team.matrix(k, 1));
    }
    block_barrier(exec);
    if (!exists) return;
    for (int first = team.warp * kRows; first < k.area; first += team.warps * kRows)
      attend(exec, k, team, window.image, head, first);
  }

 private:
  // Four queries, from `first` on.
  template <class Exec>
  VITZOO_DEVICE static void attend(Exec& exec, const WindowAttentionCudaArgs& k, const attention::Team& team,
                                   int64_t image, int head, int first) {
    using namespace attention;
    exec.sync_warp();  // the rows before were read
    for (int c = exec.lane(); c < k.head_dim; c += kWarp) {
      Quad row;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        row.values[r] = first + r < k.area ? load_qkv(k, image, team.place[first + r], 0, head, c) : 0.0f;
      team.rows[c] = row;
    }
    exec.sync_warp();
    float weights[kRows][NK] = {}, sums[kRows];
    products<NK>(exec, k, team.rows, team.matrix(k, 0), weights);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int n = 0; n < NK; ++n)
        weights[r][n] = score(k, team, head, first + r, exec.lane() + n * kWarp, weights[r][n]);
      float most;
      exponentiate<NK>(exec, weights[r], most, sums[r]);
    }
    share_weights<NK>(exec, k, team, weights);
    for (int c = exec.lane(); c < k.head_dim; c += kWarp) {
      const Quad out = weighted_sum(k, team, team.matrix(k, 1), c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int place = first + r < k.area ? team.place[first + r] : -1;
        if (place < 0) continue;
        store_one(k.out, token_at(k, k.out, image, place) + head * k.head_dim + c, out.values[r] / sums[r]);
      }
    }
  }
};

}  // namespace vitzoo
