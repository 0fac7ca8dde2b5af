// The host form of exec.cuh: a block's threads are fibers of one CPU thread, which take turns at barriers and
// shuffles. It is for tests: it finds what a GPU would hide or hang on. Shared memory starts as NaN; a
// barrier or shuffle that some threads never reach is an error;
// VITZOO_CUDA_HOST_ORDER=forward|reverse|shuffled runs the threads in another order, so that a missing
// barrier shows as another result.
#pragma once

#include <cstring>
#include <functional>

#include "exec.cuh"

namespace vitzoo {

namespace host {
class Block;
}

class HostExec {
 public:
  HostExec(host::Block& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const;
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  int warps() const { return threads() / kWarp; }
  int64_t block() const;

  void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE());

  void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    exchange(0.0f, lane(), file, line);
  }

  float shuffle_up(float value, int delta, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int source = lane() - delta;
    return exchange(value, source < 0 ? lane() : source, file, line);
  }
  float shuffle_down(float value, int delta, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
    const int source = lane() + delta;
    return exchange(value, source >= kWarp ? lane() : source, file, line);
  }
  float shuffle_xor(float value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return exchange(value, lane() ^ mask, file, line);
  }
  float shuffle(float value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return exchange(value, source % kWarp, file, line);
  }

  void* shared();

 private:
  float exchange(float value, int source, const char* file, int line);

  host::Block& block_;
  int thread_;
};

// Runs every block of a launch; the blocks are spread over the CPU's cores. Throws std::runtime_error where
// threads of a block part ways at a barrier or shuffle, and passes on what the body throws.
void run_on_host(const Grid& grid, const std::function<void(HostExec&)>& body);

}  // namespace vitzoo
