// Attention of strided rows, forward and backward, for one instruction set.
#pragma once

#include "attention.h"
#include "attention_args.h"

namespace {

using vitzoo::AttentionArgs;
using vitzoo::HeadsView;

VITZOO_INLINE int64_t bytes_of(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

// Writes the addresses of `count` rows from token `first` on.
inline void find_rows(const HeadsView& x, int64_t b, int64_t head, int64_t first, int64_t count, void** row) {
  const int64_t size = bytes_of(x.kind);
  char* p = static_cast<char*>(x.data) + (b * x.batch + head * x.head + first * x.token) * size;
  for (int64_t i = 0; i < count; ++i, p += x.token * size) {
    row[i] = p;
  }
}

template <class T>
void** take_rows(Arena<T>& arena, int64_t count) {
  static_assert(sizeof(T) <= sizeof(void*), "");
  return reinterpret_cast<void**>(arena.take(count * int64_t(sizeof(void*) / sizeof(T))));
}

// A work item: one part of the queries of one head of one image, in whole blocks.
struct Item {
  int64_t part, batch, head, begin, end;
  Item(const AttentionArgs& k, int64_t number) {
    part = number % k.parts;
    head = number / k.parts % k.heads;
    batch = number / k.parts / k.heads;
    const int64_t blocks = (k.queries + k.block - 1) / k.block;
    begin = part * blocks / k.parts * k.block;
    end = (part + 1) * blocks / k.parts * k.block;
    end = end < k.queries ? end : k.queries;
  }
};

template <class T>
inline void pack_keys_and_values(const AttentionArgs& k, const Item& item, void** rows, T* keys, T* values) {
  find_rows(k.k, item.batch, item.head, 0, k.keys, rows);
  pack_rows<T>({rows, 0, k.k.kind}, k.keys, k.head_dim, keys);
  find_rows(k.v, item.batch, item.head, 0, k.keys, rows);
  pack_rows<T>({rows, 0, k.v.kind}, k.keys, k.head_dim, values);
}

template <class T>
inline void forward_pass(const AttentionArgs& k, int64_t begin, int64_t end, void* memory) {
  const int64_t d = k.head_dim, dp = round_up<T>(d);
  Arena<T> arena{static_cast<T*>(memory)};
  void** const rows = take_rows(arena, k.keys);
  void** const q_rows = take_rows(arena, k.block);
  void** const out_rows = take_rows(arena, k.block);
  T* const keys = arena.take(k.keys * dp);
  T* const values = arena.take(k.keys * dp);
  const ForwardScratch<T> scratch(arena, d);
  for (int64_t number = begin; number < end; ++number) {
    const Item item(k, number);
    if (number == begin || item.part == 0) {
      pack_keys_and_values(k, item, rows, keys, values);
    }
    for (int64_t q0 = item.begin; q0 < item.end; q0 += k.block) {
      const int64_t count = item.end - q0 < k.block ? item.end - q0 : k.block;
      find_rows(k.q, item.batch, item.head, q0, count, q_rows);
      find_rows(k.out, item.batch, item.head, q0, count, out_rows);
      Extras<T> extras;
      if (k.first_rows != nullptr && q0 == 0) {
        extras.first_row = static_cast<T*>(k.first_rows) + (item.batch * k.heads + item.head) * k.keys;
      }
      attend<T>(scratch, {q_rows, 0, k.q.kind}, count, keys, values, k.keys, d, T(k.scale), extras,
                {out_rows, 0, k.out.kind});
    }
  }
}

template <class T>
inline void backward_pass(const AttentionArgs& k, int64_t begin, int64_t end, void* memory) {
  const int64_t d = k.head_dim, size = k.keys * round_up<T>(d);
  Arena<T> arena{static_cast<T*>(memory)};
  void** const rows = take_rows(arena, k.keys);
  void** const q_rows = take_rows(arena, k.block);
  void** const dout_rows = take_rows(arena, k.block);
  void** const dq_rows = take_rows(arena, k.block);
  T *const keys = arena.take(size), *const values = arena.take(size);
  T *const dkeys = arena.take(size), *const dvalues = arena.take(size);
  const BackwardScratch<T> scratch(arena, k.keys, d);
  const T scale = T(k.scale);
  for (int64_t number = begin; number < end; ++number) {
    const Item item(k, number);
    if (number == begin || item.part == 0) {
      pack_keys_and_values(k, item, rows, keys, values);
    }
    zero(dkeys, size);
    zero(dvalues, size);
    Gradients<T> gradients{dkeys, dvalues};
    for (int64_t q0 = item.begin; q0 < item.end; q0 += k.block) {
      const int64_t count = item.end - q0 < k.block ? item.end - q0 : k.block;
      find_rows(k.q, item.batch, item.head, q0, count, q_rows);
      find_rows(k.dout, item.batch, item.head, q0, count, dout_rows);
      find_rows(k.dq, item.batch, item.head, q0, count, dq_rows);
      gradients.dfirst_row = k.dfirst_row != nullptr && q0 == 0
                                 ? static_cast<const T*>(k.dfirst_row) + item.batch * k.keys
                                 : nullptr;
      attend_backward<T>(scratch, {q_rows, 0, k.q.kind}, {dout_rows, 0, k.dout.kind}, count, keys, values,
                         k.keys, d, scale, {}, gradients, {dq_rows, 0, k.dq.kind});
    }
    find_rows(k.dk, item.part * k.batch + item.batch, item.head, 0, k.keys, rows);
    unpack_rows<T>(dkeys, k.keys, d, scale, {rows, 0, k.dk.kind});
    find_rows(k.dv, item.part * k.batch + item.batch, item.head, 0, k.keys, rows);
    unpack_rows<T>(dvalues, k.keys, d, T(1), {rows, 0, k.dv.kind});
  }
}

const vitzoo::AttentionKernels kKernels = {forward_pass<float>, forward_pass<double>, backward_pass<float>,
                                           backward_pass<double>};

}  // namespace
