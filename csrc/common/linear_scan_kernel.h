// The kernels of one instruction set, by type.
#pragma once

#include "linear_scan_backward.h"

namespace {

template <class T>
constexpr vitzoo::LinearScanSet kSet = {output<T>,
                                        advance<T, false, false>,
                                        advance<T, false, true>,
                                        advance<T, true, false>,
                                        advance<T, true, true>,
                                        backward<T>,
                                        pass_states<T>};
constexpr vitzoo::LinearScanKernels kKernels = {kSet<float>, kSet<double>};

}  // namespace
