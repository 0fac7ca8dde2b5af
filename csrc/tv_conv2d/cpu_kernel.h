// tv_conv2d: a work item is one channel, a block of its output rows, and every image. The rows of x that the
// block reads are copied with zeros around and widened; the weights of a vector of positions are loaded once
// and used for all images, since the weight map is as many times larger than the output of an image as there
// are taps.
#pragma once

#include "../common/simd_memory.h"
#include "cpu_args.h"

namespace {

using vitzoo::kImages;
using vitzoo::kInputImages;
using vitzoo::TvConv2dArgs;

template <class T, class S>
struct Channel {
  const TvConv2dArgs& k;
  int64_t taps, pad, phase, row, plane;  // elements of a phase, a padded row, a map of the output
  Vec<T>* sums;                          // one an image
  T* buffer;
  int64_t* offsets;  // of each tap from the padded element of its output

  Channel(const TvConv2dArgs& args, void* scratch, bool whole_images) : k(args) {
    taps = k.size * k.size;
    pad = (k.size - 1) / 2;
    phase = vitzoo::tv_conv2d_phase(k);
    row = k.stride * phase;
    plane = k.out_height * k.out_width;
    sums = static_cast<Vec<T>*>(scratch);
    buffer = reinterpret_cast<T*>(sums + kImages);
    const int64_t rows = whole_images ? kInputImages * vitzoo::tv_conv2d_image_rows(k)
                                      : kImages * vitzoo::tv_conv2d_rows(k, k.block_rows);
    offsets = reinterpret_cast<int64_t*>(buffer + rows * row);
    for (int64_t i = 0; i < k.size; ++i) {
      for (int64_t j = 0; j < k.size; ++j) {
        offsets[i * k.size + j] = i * row + j % k.stride * phase + j / k.stride;
      }
    }
  }
};

// W elements where the tensor, which ends at `end`, has them; what lies beyond `count` is not to be used.
template <class T, class S>
VITZOO_INLINE Vec<T> load_some(const S* p, const S* end, int count) {
  constexpr int W = Simd<T>::W;
  return load_row<T>(p, end - p >= W ? W : count);
}

template <class T>
VITZOO_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// Rows [first, first + rows) of the padded image, split into phases.
template <class T, class S>
inline void pack(const Channel<T, S>& c, const S* image, int64_t first, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const row = out + r * c.row;
    for (int64_t i = 0; i < c.row; ++i) {
      row[i] = 0;
    }
    const int64_t y = first + r - c.pad;
    if (y < 0 || y >= c.k.height) {
      continue;
    }
    const S* const in = image + y * c.k.width;
    if (c.k.stride == 1) {
      for (int64_t x = 0; x < c.k.width; ++x) {
        row[c.pad + x] = widen(in[x]);
      }
    } else {
      for (int64_t x = 0; x < c.k.width; ++x) {
        const int64_t column = c.pad + x;
        row[column % c.k.stride * c.phase + column / c.k.stride] = widen(in[x]);
      }
    }
  }
}

// Calls body(P, first tap) with P of 9, 4 and 1 until every tap is done.
template <int P>
struct Taps {};
template <class Body>
VITZOO_INLINE void each_tap(int64_t taps, Body body) {
  int64_t p = 0;
  for (; p + 9 <= taps; p += 9) {
    body(Taps<9>{}, p);
  }
  for (; p + 4 <= taps; p += 4) {
    body(Taps<4>{}, p);
  }
  for (; p < taps; ++p) {
    body(Taps<1>{}, p);
  }
}

template <class T, class S>
void forward(const TvConv2dArgs& k, int64_t begin, int64_t end, void* scratch) {
  constexpr int W = Simd<T>::W;
  const Channel<T, S> c(k, scratch, false);
  const S* const weights = static_cast<const S*>(k.weight);
  const S* const weights_end = weights + k.channels * c.taps * c.plane;
  const S* const bias = static_cast<const S*>(k.bias);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item / k.blocks, first = item % k.blocks * k.block_rows;
    const int64_t rows = k.out_height - first < k.block_rows ? k.out_height - first : k.block_rows;
    const int64_t packed = vitzoo::tv_conv2d_rows(k, rows);
    for (int64_t image = 0; image < k.batch; image += kImages) {
      const int64_t images = k.batch - image < kImages ? k.batch - image : kImages;
      for (int64_t b = 0; b < images; ++b) {
        const int64_t plane = (image + b) * k.channels + channel;
        pack(c, static_cast<const S*>(k.x) + plane * k.height * k.width, first * k.stride, packed,
             c.buffer + b * packed * c.row);
      }
      S* const out = static_cast<S*>(k.out) + (image * k.channels + channel) * c.plane;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t x = 0; x < k.out_width; x += W) {
          const int lanes = k.out_width - x < W ? int(k.out_width - x) : W;
          const int64_t place = (first + r) * k.out_width + x;
          const T* const in = c.buffer + r * k.stride * c.row + x;
          Vec<T> start{};
          if (bias != nullptr) {
            start = load_some<T>(bias + channel * c.plane + place, bias + k.channels * c.plane, lanes);
          }
          for (int64_t b = 0; b < images; ++b) {
            c.sums[b] = start;
          }
          each_tap(c.taps, [&]<int P>(Taps<P>, int64_t tap) __attribute__((always_inline)) {
            Vec<T> w[P];
#pragma GCC unroll 9
            for (int p = 0; p < P; ++p) {
              w[p] =
                  load_some<T>(weights + (channel * c.taps + tap + p) * c.plane + place, weights_end, lanes);
            }
            for (int64_t b = 0; b < images; ++b) {
              const T* const from = in + b * packed * c.row;
              Vec<T> sum = c.sums[b];
#pragma GCC unroll 9
              for (int p = 0; p < P; ++p) {
                sum += w[p] * load(from + c.offsets[tap + p]);
              }
              c.sums[b] = sum;
            }
          });
          // a whole vector may run into the rows of this item that come later
          const int written = (rows - r) * k.out_width - x >= W ? W : lanes;
          for (int64_t b = 0; b < images; ++b) {
            store_row<T>(out + b * k.channels * c.plane + place, c.sums[b], written);
          }
        }
      }
    }
  }
}

template <class T, class S>
void backward_weight(const TvConv2dArgs& k, int64_t begin, int64_t end, void* scratch) {
  constexpr int W = Simd<T>::W;
  const Channel<T, S> c(k, scratch, false);
  const S* const douts = static_cast<const S*>(k.dout);
  const S* const douts_end = douts + k.batch * k.channels * c.plane;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item / k.blocks, first = item % k.blocks * k.block_rows;
    const int64_t rows = k.out_height - first < k.block_rows ? k.out_height - first : k.block_rows;
    const int64_t packed = vitzoo::tv_conv2d_rows(k, rows);
    for (int64_t image = 0; image < k.batch; image += kImages) {
      const int64_t images = k.batch - image < kImages ? k.batch - image : kImages;
      for (int64_t b = 0; b < images; ++b) {
        const int64_t plane = (image + b) * k.channels + channel;
        pack(c, static_cast<const S*>(k.x) + plane * k.height * k.width, first * k.stride, packed,
             c.buffer + b * packed * c.row);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t x = 0; x < k.out_width; x += W) {
          const int lanes = k.out_width - x < W ? int(k.out_width - x) : W;
          const int64_t place = (first + r) * k.out_width + x;
          const T* const in = c.buffer + r * k.stride * c.row + x;
          Vec<T> total{};
          for (int64_t b = 0; b < images; ++b) {
            c.sums[b] = load_some<T>(douts + ((image + b) * k.channels + channel) * c.plane + place,
                                     douts_end, lanes);
            total += c.sums[b];
          }
          const auto add_to = [&](void* target, int64_t map, Vec<T> sum) {
            T* const p = static_cast<T*>(target) + map * c.plane + place;
            store_row<T>(p, image > 0 ? sum + load_row<T>(p, lanes) : sum, lanes);
          };
          if (k.dbias != nullptr) {
            add_to(k.dbias, channel, total);
          }
          each_tap(c.taps, [&]<int P>(Taps<P>, int64_t tap) __attribute__((always_inline)) {
            Vec<T> sum[P] = {};
            for (int64_t b = 0; b < images; ++b) {
              const T* const from = in + b * packed * c.row;
#pragma GCC unroll 9
              for (int p = 0; p < P; ++p) {
                sum[p] += c.sums[b] * load(from + c.offsets[tap + p]);
              }
            }
#pragma GCC unroll 9
            for (int p = 0; p < P; ++p) {
              add_to(k.dweight, channel * c.taps + tap + p, sum[p]);
            }
          });
        }
      }
    }
  }
}

template <class T, class S>
inline void unpack(const Channel<T, S>& c, const T* in, S* image) {
  for (int64_t y = 0; y < c.k.height; ++y) {
    for (int64_t x = 0; x < c.k.width; ++x) {
      const int64_t column = c.pad + x;
      const int64_t at = (y + c.pad) * c.row + column % c.k.stride * c.phase + column / c.k.stride;
      narrow(in[at], image + y * c.k.width + x);
    }
  }
}

template <class T, class S>
void backward_input(const TvConv2dArgs& k, int64_t begin, int64_t end, void* scratch) {
  constexpr int W = Simd<T>::W;
  const Channel<T, S> c(k, scratch, true);
  const int64_t groups = (k.batch + kInputImages - 1) / kInputImages;
  const int64_t size = vitzoo::tv_conv2d_image_rows(k) * c.row;
  const S* const weights = static_cast<const S*>(k.weight);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item / groups, image = item % groups * kInputImages;
    const int64_t images = k.batch - image < kInputImages ? k.batch - image : kInputImages;
    for (int64_t i = 0; i < images * size; ++i) {
      c.buffer[i] = 0;
    }
    const S* const dout = static_cast<const S*>(k.dout) + (image * k.channels + channel) * c.plane;
    for (int64_t r = 0; r < k.out_height; ++r) {
      for (int64_t x = 0; x < k.out_width; x += W) {
        // lanes beyond the row are zero on both sides: nothing of another row, were it NaN, gets in
        const int lanes = k.out_width - x < W ? int(k.out_width - x) : W;
        const int64_t place = r * k.out_width + x;
        T* const to = c.buffer + r * k.stride * c.row + x;
        for (int64_t b = 0; b < images; ++b) {
          c.sums[b] = load_row<T>(dout + b * k.channels * c.plane + place, lanes);
        }
        for (int64_t tap = 0; tap < c.taps; ++tap) {
          const Vec<T> w = load_row<T>(weights + (channel * c.taps + tap) * c.plane + place, lanes);
          for (int64_t b = 0; b < images; ++b) {
            T* const p = to + b * size + c.offsets[tap];
            const Vec<T> sum = load(p) + w * c.sums[b];
            __builtin_memcpy(p, &sum, sizeof(sum));
          }
        }
      }
    }
    for (int64_t b = 0; b < images; ++b) {
      const int64_t plane = (image + b) * k.channels + channel;
      unpack(c, c.buffer + b * size, static_cast<S*>(k.dx) + plane * k.height * k.width);
    }
  }
}

const vitzoo::TvConv2dKernels kKernels = {
    {forward<float, float>, backward_weight<float, float>, backward_input<float, float>},
    {forward<double, double>, backward_weight<double, double>, backward_input<double, double>},
    {forward<float, BFloat16>, backward_weight<float, BFloat16>, backward_input<float, BFloat16>},
    {forward<float, Float16>, backward_weight<float, Float16>, backward_input<float, Float16>}};

}  // namespace
