// What cpu.cpp hands to the kernels of each instruction set; plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace vitzoo {

// Contiguous tensors of one dtype: the map (batch, channels, height, width) and its four sequences (batch, 4,
// channels, height * width). The scan reads the map and writes the sequences, the merge the other way round.
struct CrossScanArgs {
  void* map;
  void* routes;
  int64_t channels, height, width;
  Kind kind;
};

// One pass over planes [begin, end) of batch * channels.
using CrossScanPass = void (*)(const CrossScanArgs& args, int64_t begin, int64_t end);

struct CrossScanKernels {
  CrossScanPass scan, merge;
};

extern const CrossScanKernels cross_scan_baseline, cross_scan_avx2, cross_scan_avx512;

}  // namespace vitzoo
