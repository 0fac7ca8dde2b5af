// Block-wide scans of the affine maps x -> a x + b, the associative form of a linear recurrence.
#pragma once

#include "exec.cuh"

namespace vitzoo {

struct Affine {
  float a = 1.0f, b = 0.0f;  // the identity

  VITZOO_DEVICE float operator()(float x) const { return a * x + b; }
};

// Applies `first`, then `second`.
VITZOO_DEVICE Affine then(const Affine& first, const Affine& second) {
  return {second.a * first.a, second.a * first.b + second.b};
}

// The warp's maps up to and including this lane, lane 0 first.
template <class Exec>
VITZOO_DEVICE Affine warp_scan_up(Exec& exec, Affine map) {
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const Affine before{exec.shuffle_up(map.a, delta), exec.shuffle_up(map.b, delta)};
    if (exec.lane() >= delta) map = then(before, map);
  }
  return map;
}

// The warp's maps down to and including this lane, lane 31 first.
template <class Exec>
VITZOO_DEVICE Affine warp_scan_down(Exec& exec, Affine map) {
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const Affine before{exec.shuffle_down(map.a, delta), exec.shuffle_down(map.b, delta)};
    if (exec.lane() + delta < kWarp) map = then(before, map);
  }
  return map;
}

// What a thread's piece of the recurrence starts from, and where the whole block ends.
struct Entered {
  float own, end;
};

// `inclusive` is the warp's scan up to this lane; `totals` holds the maps of all warps, first to last.
template <class Exec>
VITZOO_DEVICE Entered enter_up(Exec& exec, const Affine& inclusive, const Affine* totals, float start) {
  const Affine before{exec.shuffle_up(inclusive.a, 1), exec.shuffle_up(inclusive.b, 1)};
  float x = start, own = start;
  for (int warp = 0; warp < exec.warps(); ++warp) {
    if (warp == exec.warp()) own = x;
    x = totals[warp](x);
  }
  return {exec.lane() > 0 ? before(own) : own, x};
}

template <class Exec>
VITZOO_DEVICE Entered enter_down(Exec& exec, const Affine& inclusive, const Affine* totals, float start) {
  const Affine before{exec.shuffle_down(inclusive.a, 1), exec.shuffle_down(inclusive.b, 1)};
  float x = start, own = start;
  for (int warp = exec.warps() - 1; warp >= 0; --warp) {
    if (warp == exec.warp()) own = x;
    x = totals[warp](x);
  }
  return {exec.lane() < kWarp - 1 ? before(own) : own, x};
}

}  // namespace vitzoo
