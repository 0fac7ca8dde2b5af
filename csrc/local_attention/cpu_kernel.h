// local_attention: a work item is a few rows of one head of one image. Its rows and those that its windows
// reach are copied, widened to the compute type, into blocks with zeros around; in such a block the key of
// window position p lies a fixed distance from its query, so that all loops run over vectors of neighbouring
// queries without a condition. Zeros take part in the softmax as the definition wants.
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::LocalAttentionArgs;
using vitzoo::Planes;

template <class T>
struct Block {
  const LocalAttentionArgs& k;
  int64_t batch, head, first, rows;  // rows [first, first + rows) of the image
  int64_t pad_rows, pad_columns, stride, channel, window;
  bool flat;         // vectors run on through the padding from row to row
  int64_t* offsets;  // of each window position, in elements
  T* buffer;
  Vec<T>*scores, *gradients;

  Block(const LocalAttentionArgs& args, void* scratch) : k(args) {
    pad_rows = k.dilation * (k.kernel_height - 1) / 2;
    pad_columns = k.dilation * (k.kernel_width - 1) / 2;
    stride = k.width + 2 * pad_columns;
    channel = vitzoo::local_attention_channel(k);
    window = k.kernel_height * k.kernel_width;
    scores = static_cast<Vec<T>*>(scratch);
    gradients = scores + window;
    buffer = reinterpret_cast<T*>(gradients + window);
    offsets = reinterpret_cast<int64_t*>(buffer + (5 * k.channels + 2 * window) * channel);
    for (int64_t i = 0; i < k.kernel_height; ++i) {
      for (int64_t j = 0; j < k.kernel_width; ++j) {
        const int64_t p = i * k.kernel_width + j;
        offsets[p] = (i * k.dilation - pad_rows) * stride + j * k.dilation - pad_columns;
        offsets[window + p] = -offsets[p];
      }
    }
  }

  void start(int64_t item) {
    constexpr int W = Simd<T>::W;
    batch = item / (k.heads * k.blocks);
    head = item / k.blocks % k.heads;
    first = item % k.blocks * k.block_rows;
    rows = k.height - first < k.block_rows ? k.height - first : k.block_rows;
    flat = (rows - 1) * stride + k.width < rows * ((k.width + W - 1) / W) * W;
  }

  int64_t at(int64_t row, int64_t column) const { return (pad_rows + row) * stride + pad_columns + column; }

  // Vectors that cover every query of the block; what they write beyond a row is overwritten or never read.
  template <class Body>
  void each(Body body) const {
    constexpr int W = Simd<T>::W;
    if (flat) {
      for (int64_t t = at(0, 0); t < at(rows - 1, k.width); t += W) {
        body(t);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t t = at(r, 0); t < at(r, k.width); t += W) {
          body(t);
        }
      }
    }
  }
};

template <class T, class S>
inline void pack_of(const Block<T>& b, const S* source, int64_t channels, T* out) {
  const int64_t height = b.k.height, width = b.k.width;
  for (int64_t c = 0; c < channels; ++c) {
    T* const plane = out + c * b.channel;
    for (int64_t r = 0; r < b.rows + 2 * b.pad_rows; ++r) {
      const int64_t y = b.first - b.pad_rows + r;
      T* const row = plane + r * b.stride;
      if (y < 0 || y >= height) {
        for (int64_t x = 0; x < b.stride; ++x) {
          row[x] = 0;
        }
        continue;
      }
      const S* const in = source + (c * height + y) * width;
      for (int64_t x = 0; x < b.pad_columns; ++x) {
        row[x] = row[b.pad_columns + width + x] = 0;
      }
      for (int64_t x = 0; x < width; ++x) {
        row[b.pad_columns + x] = widen(in[x]);
      }
    }
    for (int64_t i = (b.rows + 2 * b.pad_rows) * b.stride; i < b.channel; ++i) {
      plane[i] = 0;
    }
  }
}

template <class T, class S>
inline void unpack_of(const Block<T>& b, const T* in, int64_t channels, S* target) {
  const int64_t height = b.k.height, width = b.k.width;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < b.rows; ++r) {
      const T* const row = in + c * b.channel + b.at(r, 0);
      S* const out = target + (c * height + b.first + r) * width;
      for (int64_t x = 0; x < width; ++x) {
        narrow(row[x], out + x);
      }
    }
  }
}

template <class T>
VITZOO_INLINE int64_t head_of(const Block<T>& b, const Planes& planes) {
  return b.batch * planes.batch + b.head * b.k.channels * b.k.height * b.k.width;
}

template <class T>
inline void pack(const Block<T>& b, const Planes& planes, T* out) {
  const int64_t start = head_of(b, planes);
  if constexpr (sizeof(T) == 8) {
    pack_of(b, static_cast<const double*>(planes.data) + start, b.k.channels, out);
  } else if (planes.kind == Kind::bf16) {
    pack_of(b, static_cast<const BFloat16*>(planes.data) + start, b.k.channels, out);
  } else if (planes.kind == Kind::f16) {
    pack_of(b, static_cast<const Float16*>(planes.data) + start, b.k.channels, out);
  } else {
    pack_of(b, static_cast<const float*>(planes.data) + start, b.k.channels, out);
  }
}

template <class T>
inline void unpack(const Block<T>& b, const T* in, const Planes& planes) {
  const int64_t start = head_of(b, planes);
  if constexpr (sizeof(T) == 8) {
    unpack_of(b, in, b.k.channels, static_cast<double*>(planes.data) + start);
  } else if (planes.kind == Kind::bf16) {
    unpack_of(b, in, b.k.channels, static_cast<BFloat16*>(planes.data) + start);
  } else if (planes.kind == Kind::f16) {
    unpack_of(b, in, b.k.channels, static_cast<Float16*>(planes.data) + start);
  } else {
    unpack_of(b, in, b.k.channels, static_cast<float*>(planes.data) + start);
  }
}

template <class T>
VITZOO_INLINE T* map_of(const Block<T>& b, void* map) {
  return static_cast<T*>(map) + (b.batch * b.k.heads + b.head) * b.window * b.k.height * b.k.width;
}

template <class T>
VITZOO_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
VITZOO_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// out[p] = sum over channels of x[c] y[c, offset p], for P window positions.
template <class T, int P>
VITZOO_INLINE void dots_of(const T* x, const T* y, int64_t channels, int64_t stride, const int64_t* offsets,
                           Vec<T>* out) {
  Vec<T> sum[P] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<T> v = load(x + c * stride);
#pragma GCC unroll 9
    for (int p = 0; p < P; ++p) {
      sum[p] += v * load(y + c * stride + offsets[p]);
    }
  }
#pragma GCC unroll 9
  for (int p = 0; p < P; ++p) {
    out[p] = sum[p];
  }
}

// out[c] (+)= sum over P window positions of weights[p] y[c, offset p].
template <class T, int P>
VITZOO_INLINE void add_of(const Vec<T>* weights, const T* y, int64_t channels, int64_t stride,
                          const int64_t* offsets, T* out, bool more) {
  Vec<T> w[P];
#pragma GCC unroll 9
  for (int p = 0; p < P; ++p) {
    w[p] = weights[p];
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> sum = more ? load(out + c * stride) : Vec<T>{};
#pragma GCC unroll 9
    for (int p = 0; p < P; ++p) {
      sum += w[p] * load(y + c * stride + offsets[p]);
    }
    store(out + c * stride, sum);
  }
}

template <class T>
inline void dots(const Block<T>& b, const T* x, const T* y, Vec<T>* out) {
  int64_t p = 0;
  for (; p + 9 <= b.window; p += 9) {
    dots_of<T, 9>(x, y, b.k.channels, b.channel, b.offsets + p, out + p);
  }
  for (; p + 4 <= b.window; p += 4) {
    dots_of<T, 4>(x, y, b.k.channels, b.channel, b.offsets + p, out + p);
  }
  for (; p < b.window; ++p) {
    dots_of<T, 1>(x, y, b.k.channels, b.channel, b.offsets + p, out + p);
  }
}

template <class T>
inline void add(const Block<T>& b, const Vec<T>* weights, const T* y, const int64_t* offsets, T* out) {
  int64_t p = 0;
  for (; p + 9 <= b.window; p += 9) {
    add_of<T, 9>(weights + p, y, b.k.channels, b.channel, offsets + p, out, p > 0);
  }
  for (; p + 4 <= b.window; p += 4) {
    add_of<T, 4>(weights + p, y, b.k.channels, b.channel, offsets + p, out, p > 0);
  }
  for (; p < b.window; ++p) {
    add_of<T, 1>(weights + p, y, b.k.channels, b.channel, offsets + p, out, p > 0);
  }
}

// scores -> their softmax over the window.
template <class T>
inline void softmax(const Block<T>& b) {
  Vec<T> largest = b.scores[0] = b.scores[0] * T(b.k.scale);
  for (int64_t p = 1; p < b.window; ++p) {
    b.scores[p] = b.scores[p] * T(b.k.scale);
    largest = larger(largest, b.scores[p]);
  }
  Vec<T> sum{};
  for (int64_t p = 0; p < b.window; ++p) {
    b.scores[p] = exp_nonpositive<T>(b.scores[p] - largest);
    sum += b.scores[p];
  }
  const Vec<T> factor = T(1) / sum;
  for (int64_t p = 0; p < b.window; ++p) {
    b.scores[p] *= factor;
  }
}

template <class T>
void forward(const LocalAttentionArgs& k, int64_t begin, int64_t end, void* scratch) {
  Block<T> b(k, scratch);
  const int64_t size = k.channels * b.channel;
  T *const q = b.buffer, *const keys = q + size, *const values = keys + size, *const out = values + size;
  for (int64_t item = begin; item < end; ++item) {
    b.start(item);
    pack(b, k.q, q);
    pack(b, k.k, keys);
    pack(b, k.v, values);
    b.each([&](int64_t t) {
      dots(b, q + t, keys + t, b.scores);
      softmax(b);
      add(b, b.scores, values + t, b.offsets, out + t);
    });
    unpack(b, out, k.out);
  }
}

template <class T>
void backward_maps(const LocalAttentionArgs& k, int64_t begin, int64_t end, void* scratch) {
  Block<T> b(k, scratch);
  const int64_t size = k.channels * b.channel;
  T *const q = b.buffer, *const keys = q + size, *const values = keys + size, *const dout = values + size;
  T *const dq = dout + size, *const weights = dq + size, *const dscores = weights + b.window * b.channel;
  for (int64_t item = begin; item < end; ++item) {
    b.start(item);
    pack(b, k.q, q);
    pack(b, k.k, keys);
    pack(b, k.v, values);
    pack(b, k.dout, dout);
    b.each([&](int64_t t) {
      dots(b, q + t, keys + t, b.scores);
      softmax(b);
      dots(b, dout + t, values + t, b.gradients);
      Vec<T> mean{};
      for (int64_t p = 0; p < b.window; ++p) {
        mean += b.scores[p] * b.gradients[p];
      }
      for (int64_t p = 0; p < b.window; ++p) {
        b.gradients[p] = b.scores[p] * (b.gradients[p] - mean) * T(k.scale);
        store(weights + p * b.channel + t, b.scores[p]);
        store(dscores + p * b.channel + t, b.gradients[p]);
      }
      add(b, b.gradients, keys + t, b.offsets, dq + t);
    });
    unpack(b, dq, k.dq);
    unpack_of(b, weights, b.window, map_of(b, k.weights));
    unpack_of(b, dscores, b.window, map_of(b, k.dscores));
  }
}

template <class T>
void backward_windows(const LocalAttentionArgs& k, int64_t begin, int64_t end, void* scratch) {
  Block<T> b(k, scratch);
  const int64_t size = k.channels * b.channel;
  T *const q = b.buffer, *const dout = q + size, *const dk = dout + size, *const dv = dk + size;
  T *const weights = dv + size, *const dscores = weights + b.window * b.channel;
  for (int64_t item = begin; item < end; ++item) {
    b.start(item);
    pack(b, k.q, q);
    pack(b, k.dout, dout);
    pack_of(b, map_of(b, k.weights), b.window, weights);
    pack_of(b, map_of(b, k.dscores), b.window, dscores);
    const int64_t* const back = b.offsets + b.window;  // from a key to the queries that look at it
    b.each([&](int64_t t) {
      for (int64_t p = 0; p < b.window; ++p) {
        b.scores[p] = load(weights + p * b.channel + t + back[p]);
        b.gradients[p] = load(dscores + p * b.channel + t + back[p]);
      }
      add(b, b.scores, dout + t, back, dv + t);
      add(b, b.gradients, q + t, back, dk + t);
    });
    unpack(b, dk, k.dk);
    unpack(b, dv, k.dv);
  }
}

const vitzoo::LocalAttentionKernels kKernels = {
    {forward<float>, backward_maps<float>, backward_windows<float>},
    {forward<double>, backward_maps<double>, backward_windows<double>}};

}  // namespace
