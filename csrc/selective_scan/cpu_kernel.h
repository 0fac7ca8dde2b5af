// Selective scan, forward and backward, for one instruction set. A tile is W channels, one a lane. Within a
// stretch of tokens the loop over the state stands outside and the loop over tokens inside: a state and its
// row of A stay in registers, B and C are read along their contiguous rows, and the exponentials of different
// tokens overlap.
//
// Legend: s step after bias and softplus, x = u, drive = s x, h state, g gradient of h, a = exp(s A).
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::kBackwardTokens;
using vitzoo::kForwardTokens;
using vitzoo::SelectiveScanArgs;

// B or C of one state: a row over tokens shared by the lanes, or a constant of each lane.
template <class T, bool Constant>
struct Row;

template <class T>
struct Row<T, false> {
  const T* p;
  VITZOO_INLINE T at(int64_t t) const { return p[t]; }
};

template <class T>
struct Row<T, true> {
  Vec<T> v;
  VITZOO_INLINE Vec<T> at(int64_t) const { return v; }
};

// Vector registers; as many states as leave room for the constants advance at once.
constexpr int kRegisters = VITZOO_VECTOR_BYTES == 64 ? 32 : 16;

struct Tile {
  int64_t batch, group, part, channel;
  int width;
  bool first_of_part;
};

template <class T>
VITZOO_INLINE Vec<T> load_lanes(const void* base, const Tile& tile, int64_t stride, int64_t offset) {
  constexpr int W = Simd<T>::W;
  Vec<T> out{};
  if (base != nullptr) {
    T values[W] = {};
    const T* const p = static_cast<const T*>(base) + tile.channel * stride + offset;
    for (int r = 0; r < tile.width; ++r) {
      values[r] = p[r * stride];
    }
    __builtin_memcpy(&out, values, sizeof(out));
  }
  return out;
}

template <class T>
VITZOO_INLINE void store_lanes(void* base, const Tile& tile, int64_t stride, int64_t offset, Vec<T> v) {
  constexpr int W = Simd<T>::W;
  T values[W];
  __builtin_memcpy(values, &v, sizeof(v));
  T* const p = static_cast<T*>(base) + tile.channel * stride + offset;
  for (int r = 0; r < tile.width; ++r) {
    p[r * stride] = values[r];
  }
}

template <class T, bool Constant>
VITZOO_INLINE Row<T, Constant> row_of(const void* base, const SelectiveScanArgs& k, const Tile& tile,
                                      int64_t n, int64_t token) {
  if constexpr (Constant) {
    return {load_lanes<T>(base, tile, k.dstate, n)};
  } else {
    return {static_cast<const T*>(base) + ((tile.batch * k.groups + tile.group) * k.dstate + n) * k.seqlen +
            token};
  }
}

// The tile of a work item that starts at its channel `first`; of no width where the item ends before.
template <class T>
VITZOO_INLINE Tile tile_of(const SelectiveScanArgs& k, int64_t item, int64_t first) {
  const int64_t part = item % k.parts, group = item / k.parts % k.groups, batch = item / k.parts / k.groups;
  const int64_t start = part * k.part_channels + first;
  int64_t width = Simd<T>::W;
  width = k.group_channels - start < width ? k.group_channels - start : width;
  width = k.part_channels - first < width ? k.part_channels - first : width;
  return {batch, group, part, group * k.group_channels + start, int(width), first == 0};
}

// Calls f(tile) for the tiles of work items [begin, end).
template <class T, class F>
VITZOO_INLINE void for_tiles(const SelectiveScanArgs& k, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    int64_t first = 0;
    for (Tile tile = tile_of<T>(k, item, 0); tile.width > 0; tile = tile_of<T>(k, item, first)) {
      f(tile);
      first += Simd<T>::W;
    }
  }
}

// Step sizes of a stretch of tokens, in place; their slope with respect to delta goes to `slope` unless null.
template <class T>
VITZOO_INLINE void make_steps(const SelectiveScanArgs& k, Vec<T> bias, Vec<T>* s, Vec<T>* slope,
                              int64_t count) {
  if (!k.delta_softplus) {
    for (int64_t t = 0; t < count; ++t) {
      s[t] = s[t] + bias;
    }
  } else if (slope == nullptr) {
    for (int64_t t = 0; t < count; ++t) {
      s[t] = softplus<T>(s[t] + bias).value;
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      const Softplus<T> result = softplus<T>(s[t] + bias);
      s[t] = result.value;
      slope[t] = result.slope;
    }
  }
}

// Whether no exponent s A of a stretch of tokens needs a clamp; `fastest` is the largest |A| log2(e) of each
// lane.
template <class T>
VITZOO_INLINE bool exponents_are_plain(const Vec<T>* s, int64_t count, Vec<T> fastest) {
  Vec<T> largest{};
  for (int64_t t = 0; t < count; ++t) {
    largest = larger(largest, absolute<T>(s[t]));
  }
  return all_below<T>(largest * fastest, kPlainExponent<T>);
}

// Advances NU states over a stretch of tokens, and adds C h to y. Where `Divided`, `local` advances too: the
// states that would have been zero at the start of a piece.
template <class T, int NU, bool Clamp, bool CB, bool CC, bool Divided>
VITZOO_INLINE void advance(const SelectiveScanArgs& k, const Tile& tile, int64_t n, int64_t token,
                           int64_t count, const Vec<T>* s, const Vec<T>* drive, const Vec<T>* a2, Vec<T>* h,
                           Vec<T>* local, Vec<T>* y) {
  Row<T, CB> b[NU];
  Row<T, CC> c[NU];
  Vec<T> state[NU], apart[NU], rate[NU];
#pragma GCC unroll 8
  for (int i = 0; i < NU; ++i) {
    b[i] = row_of<T, CB>(k.b, k, tile, n + i, token);
    c[i] = row_of<T, CC>(k.c, k, tile, n + i, token);
    state[i] = h[n + i];
    rate[i] = a2[n + i];
    if constexpr (Divided) {
      apart[i] = local[n + i];
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> sum = y[t];
#pragma GCC unroll 8
    for (int i = 0; i < NU; ++i) {
      const Vec<T> a = exp2_product<T, Clamp>(s[t], rate[i]);
      if constexpr (Divided) {
        const Vec<T> push = rounded(drive[t] * b[i].at(t));
        state[i] = a * state[i] + push;
        apart[i] = a * apart[i] + push;
      } else {
        state[i] = a * state[i] + drive[t] * b[i].at(t);
      }
      sum += state[i] * c[i].at(t);
    }
    y[t] = sum;
  }
#pragma GCC unroll 8
  for (int i = 0; i < NU; ++i) {
    h[n + i] = state[i];
    if constexpr (Divided) {
      local[n + i] = apart[i];
    }
  }
}

// Advances every state; calls before(part, parts) now and then.
template <class T, bool Clamp, bool CB, bool CC, bool Divided, class F>
VITZOO_INLINE void advance_all(const SelectiveScanArgs& k, const Tile& tile, int64_t token, int64_t count,
                               const Vec<T>* s, const Vec<T>* drive, const Vec<T>* a2, Vec<T>* h,
                               Vec<T>* local, Vec<T>* y, const F& before) {
  constexpr int wide = kRegisters / 8;
  const int64_t parts = (k.dstate + wide - 1) / wide;
  int64_t n = 0;
  for (; n + wide <= k.dstate; n += wide) {
    before(n / wide, parts);
    advance<T, wide, Clamp, CB, CC, Divided>(k, tile, n, token, count, s, drive, a2, h, local, y);
  }
  if (n < k.dstate) {
    before(parts - 1, parts);
  }
  for (; n < k.dstate; ++n) {
    advance<T, 1, Clamp, CB, CC, Divided>(k, tile, n, token, count, s, drive, a2, h, local, y);
  }
}

}  // namespace
